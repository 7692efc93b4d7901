"""RetinaNet, OD-ResNet-50, K=4, on COCO, 1x."""

_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['mmdet_odconv'], allow_failed_imports=False)

model = dict(backbone=dict(_delete_=True, type='ODResNet', depth=50, kernel_num=4, norm_eval=False))

# With SGD the attentions run ahead of the kernels at the full rate (docs/from_scratch.md).
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.attention.': dict(lr_mult=0.1)}))
