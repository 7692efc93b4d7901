"""RetinaNet with a small OD-ResNet-18, K=4, from scratch on COCO128 at 256 pixels.

It shows that such a detector trains on photographs. They are too few to reach an AP with
(docs/get_started.md).
"""

_base_ = [
    '../_base_/models/retinanet_small.py',
    '../_base_/datasets/coco128_detection.py',
    '../_base_/schedules/schedule_small.py',
    '../_base_/runtime_small.py',
]

model = dict(
    backbone=dict(_delete_=True, type='ODResNet', depth=18, base_channels=16, norm_eval=False),
    neck=dict(in_channels=[16, 32, 64, 128]),
    bbox_head=dict(anchor_generator=dict(scales_per_octave=1)),
)
