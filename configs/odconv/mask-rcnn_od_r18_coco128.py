"""Mask R-CNN with a small OD-ResNet-18, K=4, from scratch on COCO128 at 256 pixels.

It shows that such a detector trains on photographs. They are too few to reach an AP with
(docs/get_started.md).
"""

_base_ = [
    '../_base_/models/mask-rcnn_small.py',
    '../_base_/datasets/coco128_instance.py',
    '../_base_/schedules/schedule_small.py',
    '../_base_/runtime_small.py',
]

model = dict(
    backbone=dict(_delete_=True, type='ODResNet', depth=18, base_channels=16, norm_eval=False),
    neck=dict(in_channels=[16, 32, 64, 128]),
)
