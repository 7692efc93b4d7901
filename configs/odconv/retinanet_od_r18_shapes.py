"""RetinaNet with a small OD-ResNet-18, K=4, from scratch on generated shapes: the demo."""

_base_ = [
    '../_base_/models/retinanet_tiny.py',
    '../_base_/datasets/shapes_detection.py',
    '../_base_/schedules/schedule_small.py',
    '../_base_/runtime_small.py',
]

# All shapes are about square, so one ratio does.
model = dict(
    backbone=dict(type='ODResNet'),
    bbox_head=dict(num_classes=5, anchor_generator=dict(ratios=[1.0])),
)

optim_wrapper = dict(optimizer=dict(lr=0.003))
train_cfg = dict(max_epochs=6, val_interval=1)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(type='CosineAnnealingLR', by_epoch=True, T_max=6, end=6, convert_to_iter_based=True),
]
