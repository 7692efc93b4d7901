"""YOLOX-tiny, its CSPDarknet converted to ODConv, K=4, on COCO, 300 epochs."""

_base_ = 'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py'

custom_imports = dict(imports=['mmdet_odconv'], allow_failed_imports=False)

model = dict(type='ODConvModel', detector={{_base_.model.type}}, odconv=dict(kernel_num=4))
