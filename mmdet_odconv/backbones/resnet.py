"""ResNet, ResNetV1d and ResNeXt with ODConv in their residual blocks.

Paper: Omni-Dimensional Dynamic Convolution, section 4.1 (https://openreview.net/forum?id=DmpCfq6Mg39)
"""

from typing import Any

from mmdet.models.backbones import ResNet, ResNetV1d, ResNeXt
from mmengine.registry import MODELS
from torch import nn

from .odconv_backbone import ODConvBackbone


class _ODResidualBlocks(ODConvBackbone):
    __doc__ = f"""Gives a ResNet of mmdet residual blocks whose convolutions are ODConv.

    The stem, the 1×1 shortcuts, deformable convolutions and plugins stay as they are.

    {ODConvBackbone.__doc__}"""

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """A stage of mmdet's backbone, its blocks' plain convolutions replaced unless frozen."""
        stage = super().make_res_layer(**kwargs)  # type: ignore[misc]
        backbone: Any = self
        if len(backbone.res_layers) < self.stages_kept_plain:
            return stage
        for block in stage:
            for name in ('conv1', 'conv2', 'conv3'):
                conv = getattr(block, name, None)
                if type(conv) is nn.Conv2d:
                    setattr(block, name, self.odconv_like(conv))
        return stage


@MODELS.register_module()
class ODResNet(_ODResidualBlocks, ResNet):
    __doc__ = f"""ResNet with ODConv (depth 18, 34, 50, 101, 152).

    {_ODResidualBlocks.__doc__}"""


@MODELS.register_module()
class ODResNetV1d(_ODResidualBlocks, ResNetV1d):
    __doc__ = f"""ResNetV1d (deep stem, average-pooled shortcuts) with ODConv.

    {_ODResidualBlocks.__doc__}"""


@MODELS.register_module()
class ODResNeXt(_ODResidualBlocks, ResNeXt):
    __doc__ = f"""ResNeXt (depth 50, 101, 152) with ODConv.

    {_ODResidualBlocks.__doc__}"""
