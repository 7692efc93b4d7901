"""Faster R-CNN, ResNet-50 with FDConv, K=64, on COCO, 1x, from ImageNet's static weights."""

_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['mmdet_odconv'], allow_failed_imports=False)

# As published. The kernels of the frozen stage stay as they are, its attentions train.
model = dict(
    backbone=dict(
        type='ODResNet',
        odconv_cfg=dict(type='FDConv2d'),
        kernel_num=64,
        train_frozen_attentions=True,
        with_cp=True,
    )
)

# Of the checkpoints the last three stay, and the best by validation AP.
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='auto'))
