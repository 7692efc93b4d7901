"""OD-MobileNetV2 0.75, K=4, on ImageNet-1k with the paper's schedule."""

_base_ = './od_mobilenetv2_in1k.py'

model = dict(backbone=dict(widen_factor=0.75))
