"""RetinaNet, OD-ResNet-18 of half width, K=4, from scratch on synthetic shapes: the demo."""

_base_ = [
    '../_base_/models/retinanet_small.py',
    '../_base_/datasets/shapes_detection.py',
    '../_base_/schedules/schedule_small.py',
    '../_base_/runtime_small.py',
]

model = dict(
    backbone=dict(_delete_=True, type='ODResNet', depth=18, base_channels=32, norm_eval=False),
    neck=dict(in_channels=[32, 64, 128, 256]),
    # Anchors from 16 pixels on: half of the shapes are smaller than 32.
    bbox_head=dict(num_classes=5, anchor_generator=dict(octave_base_scale=2)),
)

train_dataloader = dict(batch_size=4)
train_cfg = dict(max_epochs=6, val_interval=1)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=6, milestones=[4, 5])
