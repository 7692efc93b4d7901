"""The names of the published ImageNet checkpoints against those of mmdet's backbones.

Source: the state dicts of the published OD-ResNet (torchvision's ResNet names) and OD-MobileNetV2
(torchvision's ``features.N``). Static weights under torchvision's names are translated too, in
the form that torchvision gave MobileNetV2 before 0.5, without a container around convolution and
norm, as well.
"""

import re
from collections.abc import Iterable

# Blocks in each of mmdet's layer1 ... layer7, which the published file numbers through.
_MOBILENET_BLOCKS = (1, 2, 3, 4, 3, 3, 1)
_INVERTED_RESIDUAL = {
    '0.0': 'expand_conv.conv',
    '0.1': 'expand_conv.bn',
    '1.0': 'depthwise_conv.conv',
    '1.1': 'depthwise_conv.bn',
    '2': 'linear_conv.conv',
    '3': 'linear_conv.bn',
}
# The first block does not expand its input.
_FIRST_RESIDUAL = {
    '0.0': 'depthwise_conv.conv',
    '0.1': 'depthwise_conv.bn',
    '1': 'linear_conv.conv',
    '2': 'linear_conv.bn',
}
# The same two in torchvision's older form, in which 2 and 5 are activations.
_FLAT_INVERTED_RESIDUAL = {
    '0': 'expand_conv.conv',
    '1': 'expand_conv.bn',
    '3': 'depthwise_conv.conv',
    '4': 'depthwise_conv.bn',
    '6': 'linear_conv.conv',
    '7': 'linear_conv.bn',
}
_FLAT_FIRST_RESIDUAL = {
    '0': 'depthwise_conv.conv',
    '1': 'depthwise_conv.bn',
    '3': 'linear_conv.conv',
    '4': 'linear_conv.bn',
}


def is_flat(names: Iterable[str]) -> bool:
    """Whether these names are torchvision's older ones of a MobileNetV2."""
    return any(name.removeprefix('module.') == 'features.1.conv.0.weight' for name in names)


def backbone_name(published: str, flat: bool = False) -> str | None:
    """The name in ``ODResNet`` or ``ODMobileNetV2`` of an entry of a published state dict.

    Args:
        published (str): For example ``module.features.2.conv.0.0.weight``.
        flat (bool): Whether a MobileNetV2's names are the older ones (:func:`is_flat`), here
            ``features.2.conv.0.weight``. Default: False.

    Returns:
        str, optional: For example ``layer2.0.expand_conv.conv.weight``; None for an entry of the
        ImageNet classifier, which the backbones do not have.
    """
    name = published.removeprefix('module.')
    if name.startswith(('fc.', 'classifier.')):
        return None
    match = re.fullmatch(r'features\.(\d+)\.(.+)', name)
    last = 1 + sum(_MOBILENET_BLOCKS)
    if match is None or int(match[1]) > last:
        return name
    index, rest = int(match[1]), match[2]
    if index in (0, last):
        parts = {'0': 'conv', '1': 'bn'}
        return f'conv{1 if index == 0 else 2}.{_renamed(rest, parts)}'
    if flat:
        parts = _FLAT_FIRST_RESIDUAL if index == 1 else _FLAT_INVERTED_RESIDUAL
    else:
        parts = _FIRST_RESIDUAL if index == 1 else _INVERTED_RESIDUAL
    block, layer = index - 1, 0
    while block >= _MOBILENET_BLOCKS[layer]:
        block -= _MOBILENET_BLOCKS[layer]
        layer += 1
    return f'layer{layer + 1}.{block}.{_renamed(rest.removeprefix("conv."), parts)}'


def published_name(name: str) -> str:
    """The inverse of :func:`backbone_name`, without the prefix ``module.``.

    Args:
        name (str): An entry of ``ODResNet`` or ``ODMobileNetV2``.

    Returns:
        str: ResNet's names are unchanged.
    """
    match = re.fullmatch(r'conv([12])\.(conv|bn)\.(.+)', name)
    if match is not None:
        index = 0 if match[1] == '1' else 1 + sum(_MOBILENET_BLOCKS)
        return f'features.{index}.{"0" if match[2] == "conv" else "1"}.{match[3]}'
    match = re.fullmatch(r'layer(\d)\.(\d+)\.((?:expand|depthwise|linear)_conv\..+)', name)
    if match is None:
        return name
    layer, block, rest = int(match[1]), int(match[2]), match[3]
    index = 1 + sum(_MOBILENET_BLOCKS[: layer - 1]) + block
    parts = _FIRST_RESIDUAL if index == 1 else _INVERTED_RESIDUAL
    return f'features.{index}.conv.{_renamed(rest, {new: old for old, new in parts.items()})}'


def _renamed(name: str, parts: dict[str, str]) -> str:
    for old, new in parts.items():
        if name.startswith(f'{old}.'):
            return f'{new}.{name[len(old) + 1 :]}'
    return name
