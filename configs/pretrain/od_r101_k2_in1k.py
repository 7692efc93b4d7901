"""OD-ResNet-101, K=2, on ImageNet-1k with the paper's schedule."""

_base_ = './od_r50_in1k.py'

model = dict(backbone=dict(depth=101, kernel_num=2))
