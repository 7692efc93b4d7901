"""RetinaNet, EfficientNet-Lite0 with ImageNet weights, on DeepPCB: the plain twin."""

_base_ = [
    '../_base_/models/retinanet_efficientnet-lite0.py',
    '../_base_/datasets/deeppcb_detection.py',
    '../_base_/schedules/schedule_fine_tune.py',
    '../_base_/runtime_small.py',
]

# The scans at their full size, in training as crops of a quarter.
scale = (640, 640)

train_pipeline = _base_.train_pipeline
train_pipeline[2] = dict(type='RandomCrop', crop_size=(320, 320))
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = scale

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

# Three levels, with anchors from 32 to 200 pixels.
model = dict(
    neck=dict(num_outs=3),
    bbox_head=dict(num_classes=6, anchor_generator=dict(strides=[8, 16, 32])),
)
