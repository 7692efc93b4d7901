"""What a backbone is, read off the names and shapes of its state dict."""

from collections.abc import Mapping

from torch import Tensor

# What :func:`describe` gives as K of plain convolutions.
STATIC = 'none (static)'


def describe(state_dict: Mapping[str, Tensor]) -> dict[str, str | int]:
    """Family, depth, width and K of an ODResNet or ODMobileNetV2.

    Args:
        state_dict (Mapping[str, Tensor]): Entries under the backbones' own names.

    Returns:
        dict: 'family' is 'ResNet' or 'MobileNetV2', 'depth' (ResNet only) counts as the paper
        does, 'width' is the number of channels after the first convolution, and 'K' is the
        number of kernels in a bank, or 'none (static)'. Empty for anything else.
    """
    blocks = {name.rpartition('.conv1.')[0] for name in state_dict if '.conv1.weight' in name}
    if 'conv1.conv.weight' in state_dict and 'conv2.conv.weight' in state_dict:
        stem, inner = state_dict['conv1.conv.weight'], state_dict['conv2.conv.weight']
        parts: dict[str, str | int] = {'family': 'MobileNetV2'}
    elif 'conv1.weight' in state_dict and 'layer1.0.conv1.weight' in state_dict:
        stem = state_dict['conv1.weight']
        # The last stage, because earlier ones are plain where they are frozen.
        first = state_dict['layer1.0.conv1.weight']
        inner = state_dict.get('layer4.0.conv1.weight', first)
        convs = 3 if 'layer1.0.conv3.weight' in state_dict else 2
        parts = {'family': 'ResNet', 'depth': convs * len(blocks) + 2}
    else:
        return {}
    kernel_num = inner.shape[0] if inner.dim() == 5 else STATIC
    return {**parts, 'width': stem.shape[0], 'K': kernel_num}


def differences(file: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> list[str]:
    """In what the backbones of a file and of a model differ, one phrase each, with both values."""
    theirs, ours = describe(file), describe(model)
    if theirs.get('family') != ours.get('family'):
        theirs, ours = ({k: v for k, v in d.items() if k == 'family'} for d in (theirs, ours))
    return [
        f'{key} is {theirs.get(key, "unknown")} in the file and {ours.get(key, "unknown")} '
        'in the model'
        for key in dict.fromkeys([*theirs, *ours])
        if theirs.get(key) != ours.get(key)
    ]
