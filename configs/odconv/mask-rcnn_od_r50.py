"""Mask R-CNN, OD-ResNet-50, K=4, on COCO, 1x, from ImageNet's static weights."""

_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['mmdet_odconv'], allow_failed_imports=False)

# With two images a GPU, a BatchNorm in the attention would have two values to normalise over.
model = dict(
    backbone=dict(type='ODResNet', kernel_num=4, odconv_cfg=dict(norm_cfg=dict(type='LN')))
)

# With SGD the attentions run ahead of the kernels at the full rate, and banks that start from
# static weights stay behind (docs/recipes.md).
optim_wrapper = dict(
    constructor='ODConvOptimWrapperConstructor',
    paramwise_cfg=dict(attention_lr_mult=0.1, bank_lr_mult='compensated'),
)

# Of the checkpoints the last three stay, and the best by validation AP.
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='auto'))
