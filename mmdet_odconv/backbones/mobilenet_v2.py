"""MobileNetV2 with ODConv in every convolution but the first.

Paper: Omni-Dimensional Dynamic Convolution, section 4.1 (https://openreview.net/forum?id=DmpCfq6Mg39)
"""

from typing import Any

from mmcv.cnn import ConvModule
from mmdet.models.backbones import MobileNetV2
from mmengine.registry import MODELS
from torch import nn

from .odconv_backbone import ODConvBackbone


@MODELS.register_module()
class ODMobileNetV2(ODConvBackbone, MobileNetV2):
    __doc__ = f"""MobileNetV2 with ODConv; the paper uses the widths 0.5, 0.75 and 1.0.

    ``out_indices=(1, 2, 4, 7)`` gives the maps of stride 4, 8, 16 and 32; at width 1.0 they have
    24, 32, 96 and 1280 channels.

    {ODConvBackbone.__doc__}"""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        stages = [getattr(self, name) for name in self.layers[self.stages_kept_plain :]]
        for module in nn.ModuleList(stages).modules():
            if isinstance(module, ConvModule):
                module.conv = self.odconv_like(module.conv)
