"""RetinaNet, EfficientNet-Lite0 with ImageNet weights, on your own images: the plain twin."""

_base_ = [
    '../_base_/models/retinanet_efficientnet-lite0.py',
    '../_base_/datasets/own_detection.py',
    '../_base_/schedules/schedule_fine_tune.py',
    '../_base_/runtime_small.py',
]

model = dict(bbox_head=dict(num_classes=len(_base_.metainfo.classes)))
