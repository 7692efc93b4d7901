"""Mask R-CNN, OD-ResNet-101, K=2, on COCO, 1x."""

_base_ = './mask-rcnn_od_r50.py'

model = dict(backbone=dict(depth=101, kernel_num=2))
