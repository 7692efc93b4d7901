"""A small OD-ResNet-18, K=4, on generated images: the road from pretraining to detection on a CPU.

It has the backbone of the study's detectors (docs/study.md). retinanet_od_r18_shapes-hard.py is a
detector that starts from its checkpoint.
"""

_base_ = [
    '../_base_/datasets/shapes_classification.py',
    'mmpretrain::_base_/default_runtime.py',
]

custom_imports = dict(imports=['mmdet_odconv'], allow_failed_imports=False)

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='ODResNet',
        depth=18,
        base_channels=16,
        out_indices=(3,),
        norm_eval=False,
        odconv_cfg=dict(norm_cfg=dict(type='LN')),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=15,
        in_channels=128,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
)

train_cfg = dict(by_epoch=True, max_epochs=3, val_interval=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=0.001, weight_decay=0.05))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', T_max=3, by_epoch=True, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=32)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
