"""Faster R-CNN, OD-ResNet-101, K=2, on COCO, 1x, from ImageNet's static weights."""

_base_ = './faster-rcnn_od_r50.py'

model = dict(
    backbone=dict(depth=101, kernel_num=2, init_cfg=dict(checkpoint='torchvision://resnet101'))
)
