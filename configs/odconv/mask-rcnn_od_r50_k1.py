"""Mask R-CNN, OD-ResNet-50, K=1, on COCO, 1x."""

_base_ = './mask-rcnn_od_r50.py'

model = dict(backbone=dict(kernel_num=1))
