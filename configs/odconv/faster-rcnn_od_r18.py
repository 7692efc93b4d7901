"""Faster R-CNN, OD-ResNet-18, K=4, on COCO, 1x."""

_base_ = './faster-rcnn_od_r50.py'

model = dict(backbone=dict(depth=18), neck=dict(in_channels=[64, 128, 256, 512]))
