"""DINO, ResNet-50 converted to ODConv, K=4, on COCO, 12 epochs, from ImageNet's static weights."""

_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'

custom_imports = dict(imports=['mmdet_odconv'], allow_failed_imports=False)

model = dict(
    type='ODConvModel',
    detector={{_base_.model.type}},
    odconv=dict(kernel_num=4, norm_cfg=dict(type='LN')),
)

# AdamW's steps do not grow with the gradients, so the attentions take the same rate as the rest.
# The banks start from static weights and are larger than those (docs/recipes.md).
optim_wrapper = dict(
    constructor='ODConvOptimWrapperConstructor', paramwise_cfg=dict(bank_lr_mult='compensated')
)

# Of the checkpoints the last three stay, and the best by validation AP.
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='auto'))
