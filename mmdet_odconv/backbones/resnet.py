"""ResNet, ResNetV1d and ResNeXt with ODConv in their residual blocks.

Paper: Omni-Dimensional Dynamic Convolution, section 4.1 (https://openreview.net/forum?id=DmpCfq6Mg39)
"""

from typing import Any

from mmdet.models.backbones import ResNet, ResNetV1d, ResNeXt
from mmengine.registry import MODELS
from torch import nn

from ..layers import ODConv2d


class _ODResidualBlocks:
    """Gives a ResNet of mmdet residual blocks whose convolutions are ODConv.

    The stem, the 1×1 shortcuts, deformable convolutions and plugins stay as they are.

    Args:
        *args, **kwargs: Those of mmdet's backbone.
        kernel_num (int): K, kernels in each bank. Default: 4.
        reduction (float): Width of the attention branches relative to their input. Default: 1/16.
        temperature (float): T of the attentions. Default: 1.0.
        odconv_cfg (dict, optional): Further arguments of every
            :class:`~mmdet_odconv.ODConv2d`, for example ``dict(norm_cfg=dict(type='LN'))``.
    """

    def __init__(
        self,
        *args: Any,
        kernel_num: int = 4,
        reduction: float = 1 / 16,
        temperature: float = 1.0,
        odconv_cfg: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # Read by make_res_layer, which the constructor of mmdet's backbone calls.
        self.odconv_args = {
            'kernel_num': kernel_num,
            'reduction': reduction,
            'temperature': temperature,
            **(odconv_cfg or {}),
        }
        super().__init__(*args, **kwargs)

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """A stage of mmdet's backbone, its blocks' plain convolutions replaced."""
        stage = super().make_res_layer(**kwargs)  # type: ignore[misc]
        for block in stage:
            for name in ('conv1', 'conv2', 'conv3'):
                conv = getattr(block, name, None)
                if type(conv) is nn.Conv2d:
                    setattr(block, name, ODConv2d.like(conv, **self.odconv_args))
        return stage


@MODELS.register_module()
class ODResNet(_ODResidualBlocks, ResNet):
    __doc__ = f'ResNet with ODConv (depth 18, 34, 50, 101, 152).\n{_ODResidualBlocks.__doc__}'


@MODELS.register_module()
class ODResNetV1d(_ODResidualBlocks, ResNetV1d):
    __doc__ = (
        f'ResNetV1d (deep stem, average-pooled shortcuts) with ODConv.\n{_ODResidualBlocks.__doc__}'
    )


@MODELS.register_module()
class ODResNeXt(_ODResidualBlocks, ResNeXt):
    __doc__ = f'ResNeXt (depth 50, 101, 152) with ODConv.\n{_ODResidualBlocks.__doc__}'
