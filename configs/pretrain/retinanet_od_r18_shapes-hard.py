"""RetinaNet on the generated set of the study, with the backbone that od_r18_shapes.py makes."""

_base_ = '../../tools/study/pretrained.py'

model = dict(backbone=dict(type='ODResNet', odconv_cfg=dict(norm_cfg=dict(type='LN'))))
