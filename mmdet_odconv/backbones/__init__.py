"""MMDetection's backbones with ODConv in their blocks."""

from .mobilenet_v2 import ODMobileNetV2
from .resnet import ODResNet, ODResNetV1d, ODResNeXt

__all__ = ['ODMobileNetV2', 'ODResNeXt', 'ODResNet', 'ODResNetV1d']
