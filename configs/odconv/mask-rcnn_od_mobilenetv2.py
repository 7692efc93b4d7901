"""Mask R-CNN, OD-MobileNetV2 1.0, K=4, on COCO, 1x."""

_base_ = './mask-rcnn_od_r50.py'

model = dict(
    backbone=dict(_delete_=True, type='ODMobileNetV2', kernel_num=4, out_indices=(1, 2, 4, 7)),
    neck=dict(in_channels=[24, 32, 96, 1280]),
)
