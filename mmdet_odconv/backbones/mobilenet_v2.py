"""MobileNetV2 with ODConv in every convolution but the first.

Paper: Omni-Dimensional Dynamic Convolution, section 4.1 (https://openreview.net/forum?id=DmpCfq6Mg39)
"""

from typing import Any

from mmcv.cnn import ConvModule
from mmdet.models.backbones import MobileNetV2
from mmengine.registry import MODELS

from ..layers import ODConv2d


@MODELS.register_module()
class ODMobileNetV2(MobileNetV2):
    """MobileNetV2 with ODConv, the widths of the paper being 0.5, 0.75 and 1.0.

    ``out_indices=(1, 2, 4, 7)`` gives the maps of stride 4, 8, 16 and 32; at width 1.0 they have
    24, 32, 96 and 1280 channels.

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
        super().__init__(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, ConvModule) and module is not self.conv1:
                module.conv = ODConv2d.like(
                    module.conv,
                    kernel_num=kernel_num,
                    reduction=reduction,
                    temperature=temperature,
                    **(odconv_cfg or {}),
                )
