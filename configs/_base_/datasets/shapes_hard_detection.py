"""Hard synthetic shapes at 128×128, made by tools/study/make_shapes_dataset.py with --hard.

Root: data/shapes_hard, or the environment variable SHAPES_HARD_ROOT.
"""

_base_ = './shapes_detection.py'

data_root = '{{$SHAPES_HARD_ROOT:data/shapes_hard}}'
metainfo = dict(
    _delete_=True,
    classes=tuple(
        f'{texture} {shape}'
        for texture in ('plain', 'striped', 'checked')
        for shape in ('circle', 'square', 'triangle', 'star', 'cross')
    ),
)

scale = (128, 128)

train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = scale
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = scale

train_dataloader = dict(
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline)
)
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline))
test_dataloader = val_dataloader

val_evaluator = dict(ann_file=f'{data_root}/annotations/instances_val.json')
test_evaluator = val_evaluator
