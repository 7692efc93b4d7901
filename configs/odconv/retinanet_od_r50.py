"""RetinaNet, OD-ResNet-50, K=4, on COCO, 1x."""

_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['mmdet_odconv'], allow_failed_imports=False)

model = dict(backbone=dict(_delete_=True, type='ODResNet', depth=50, kernel_num=4, norm_eval=False))
