"""Mask R-CNN, OD-ResNet-50, K=4, on COCO, 6x from scratch with GroupNorm."""

_base_ = 'mmdet::scratch/mask-rcnn_r50-scratch_fpn_gn-all_6x_coco.py'

custom_imports = dict(imports=['mmdet_odconv'], allow_failed_imports=False)

model = dict(
    backbone=dict(type='ODResNet', kernel_num=4, odconv_cfg=dict(norm_cfg=dict(type='LN')))
)

# With SGD the attentions run ahead of the kernels at the full rate (docs/recipes.md).
optim_wrapper = dict(
    constructor='ODConvOptimWrapperConstructor', paramwise_cfg=dict(attention_lr_mult=0.1)
)

# Of the checkpoints the last three stay, and the best by validation AP.
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='auto'))
