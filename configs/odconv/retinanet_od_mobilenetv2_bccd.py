"""RetinaNet, OD-MobileNetV2 0.5, K=4, from scratch on BCCD."""

_base_ = [
    '../_base_/models/retinanet_small.py',
    '../_base_/datasets/bccd_detection.py',
    '../_base_/schedules/schedule_small.py',
    '../_base_/runtime_small.py',
]

model = dict(
    backbone=dict(_delete_=True, type='ODMobileNetV2', widen_factor=0.5, out_indices=(1, 2, 4, 7)),
    neck=dict(in_channels=[16, 16, 48, 1280]),
    bbox_head=dict(num_classes=3),
)
