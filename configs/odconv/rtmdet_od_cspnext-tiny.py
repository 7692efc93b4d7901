"""RTMDet-tiny, its CSPNeXt converted to ODConv, K=4, on COCO, 300 epochs, from static weights."""

_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'

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

# 8 GPUs with 32 images each; MMDetection's config does not say so.
auto_scale_lr = dict(base_batch_size=256)

# Of the checkpoints the last three stay, and the best by validation AP.
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='auto'))
