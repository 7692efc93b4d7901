"""Cascade R-CNN, ResNet-50 converted to ODConv, K=4, on COCO, 1x."""

_base_ = 'mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['mmdet_odconv'], allow_failed_imports=False)

model = dict(type='ODConvModel', detector={{_base_.model.type}}, odconv=dict(kernel_num=4))
