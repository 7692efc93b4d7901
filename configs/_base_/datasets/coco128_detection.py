"""The first 128 photographs of COCO train2017, for training and for validation alike.

Root: data/coco128, or the environment variable COCO128_ROOT.
"""

_base_ = 'mmdet::_base_/datasets/coco_detection.py'

data_root = '{{$COCO128_ROOT:data/coco128}}'
ann_file = 'annotations/instances_train2017.json'
scale = (256, 256)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]

train_dataloader = dict(
    batch_size=8,
    dataset=dict(data_root=data_root, ann_file=ann_file, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=8,
    dataset=dict(
        data_root=data_root,
        ann_file=ann_file,
        data_prefix=dict(img='train2017/'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(ann_file=f'{data_root}/{ann_file}')
test_evaluator = val_evaluator
