"""Generated images with one object each, for a classifier: 15 classes of shapes and textures.

Made by ``python tools/study/make_shapes_dataset.py data/shapes_classification --classification
--train 22000 --val 1000 --size 64 64``, or the set in the folder that the environment variable
SHAPES_CLASSIFICATION_ROOT names.
"""

data_root = '{{$SHAPES_CLASSIFICATION_ROOT:data/shapes_classification}}'
data_preprocessor = dict(
    num_classes=15, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True
)
dataset = dict(
    type='CustomDataset',
    pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
)

train_dataloader = dict(
    batch_size=32,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        **dataset,
        data_root=data_root + '/train',
    ),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**dataset, data_root=data_root + '/val'),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy')
test_evaluator = val_evaluator
