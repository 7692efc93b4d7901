"""RetinaNet, OD-ResNet-18, K=4, from scratch on your own images: docs/own_data.md."""

_base_ = [
    '../_base_/models/retinanet_small.py',
    '../_base_/datasets/own_detection.py',
    '../_base_/schedules/schedule_small.py',
    '../_base_/runtime_small.py',
]

model = dict(
    backbone=dict(_delete_=True, type='ODResNet', depth=18, norm_eval=False),
    neck=dict(in_channels=[64, 128, 256, 512]),
    bbox_head=dict(num_classes=len(_base_.metainfo.classes)),
)
