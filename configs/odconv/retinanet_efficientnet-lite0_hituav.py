"""RetinaNet, EfficientNet-Lite0 with ImageNet weights, on HIT-UAV: the plain twin."""

_base_ = [
    '../_base_/models/retinanet_efficientnet-lite0.py',
    '../_base_/datasets/hituav_detection.py',
    '../_base_/schedules/schedule_fine_tune.py',
    '../_base_/runtime_small.py',
]

# Three levels, with anchors from 16 to 100 pixels.
model = dict(
    neck=dict(num_outs=3),
    bbox_head=dict(num_classes=3, anchor_generator=dict(octave_base_scale=2, strides=[8, 16, 32])),
)
