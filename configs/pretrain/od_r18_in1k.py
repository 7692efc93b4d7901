"""OD-ResNet-18, K=4, on ImageNet-1k with the paper's schedule."""

_base_ = './od_r50_in1k.py'

model = dict(backbone=dict(depth=18), head=dict(in_channels=512))
