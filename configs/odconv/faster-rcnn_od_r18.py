"""Faster R-CNN, OD-ResNet-18, K=4, on COCO, 1x, from ImageNet's static weights."""

_base_ = './faster-rcnn_od_r50.py'

model = dict(
    backbone=dict(depth=18, init_cfg=dict(checkpoint='torchvision://resnet18')),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
