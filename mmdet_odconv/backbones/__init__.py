"""Backbones of mmdet with ODConv, and what pretraining them on ImageNet needs besides."""

from .classifier_neck import GlobalAverageDropout
from .efficientnet_lite import EfficientNetLite
from .mobilenet_v2 import ODMobileNetV2
from .resnet import ODResNet, ODResNetV1d, ODResNeXt

__all__ = [
    'EfficientNetLite',
    'GlobalAverageDropout',
    'ODMobileNetV2',
    'ODResNeXt',
    'ODResNet',
    'ODResNetV1d',
]
