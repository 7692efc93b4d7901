"""The names of the published ImageNet checkpoints, in the terms of mmdet's backbones.

Source: the state dicts of the published OD-ResNet (torchvision's ResNet names) and OD-MobileNetV2
(torchvision's ``features.N``).
"""

import re

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


def backbone_name(published: str) -> str | None:
    """The name in ``ODResNet`` or ``ODMobileNetV2`` of an entry of a published state dict.

    Args:
        published (str): For example ``module.features.2.conv.0.0.weight``.

    Returns:
        str, optional: For example ``layer2.0.expand_conv.conv.weight``; None for an entry of the
        ImageNet classifier, which the backbones do not have.
    """
    name = published.removeprefix('module.')
    if name.startswith(('fc.', 'classifier.')):
        return None
    match = re.fullmatch(r'features\.(\d+)\.(.+)', name)
    if match is None:
        return name
    index, rest = int(match[1]), match[2]
    if index in (0, 1 + sum(_MOBILENET_BLOCKS)):
        parts = {'0': 'conv', '1': 'bn'}
        return f'conv{1 if index == 0 else 2}.{_renamed(rest, parts)}'
    parts = _FIRST_RESIDUAL if index == 1 else _INVERTED_RESIDUAL
    block, layer = index - 1, 0
    while block >= _MOBILENET_BLOCKS[layer]:
        block -= _MOBILENET_BLOCKS[layer]
        layer += 1
    return f'layer{layer + 1}.{block}.{_renamed(rest.removeprefix("conv."), parts)}'


def _renamed(name: str, parts: dict[str, str]) -> str:
    for old, new in parts.items():
        if name.startswith(f'{old}.'):
            return f'{new}.{name[len(old) + 1 :]}'
    return name
