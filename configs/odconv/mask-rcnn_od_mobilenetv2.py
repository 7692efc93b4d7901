"""Mask R-CNN, OD-MobileNetV2 1.0, K=4, on COCO, 1x, from ImageNet's static weights."""

_base_ = './mask-rcnn_od_r50.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='ODMobileNetV2',
        kernel_num=4,
        odconv_cfg=dict(norm_cfg=dict(type='LN')),
        out_indices=(1, 2, 4, 7),
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://mmdet/mobilenet_v2'),
    ),
    neck=dict(in_channels=[24, 32, 96, 1280]),
)
