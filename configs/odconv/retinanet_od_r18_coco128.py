"""RetinaNet, OD-ResNet-18, K=4, from scratch on COCO128 at 256 pixels.

It is trained to overfit: the validation images are the training images.
"""

_base_ = [
    '../_base_/models/retinanet_small.py',
    '../_base_/datasets/coco128_detection.py',
    '../_base_/schedules/schedule_small.py',
    '../_base_/runtime_small.py',
]

model = dict(
    backbone=dict(_delete_=True, type='ODResNet', depth=18, norm_eval=False),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

train_cfg = dict(max_epochs=20, val_interval=4)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=20, milestones=[16, 19])
