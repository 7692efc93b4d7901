"""The published checkpoints, into our models and back.

Published are ImageNet classifiers (OD-ResNet with torchvision's ResNet names, OD-MobileNetV2 with
torchvision's ``features.N``) and detectors of MMDetection 2 (Faster and Mask R-CNN). MMDetection 3
has left the names of those detectors' necks and heads as they were, so only the backbone's are
translated. Static weights under torchvision's names are translated too, in the form that
torchvision gave MobileNetV2 before 0.5, without a container around convolution and norm, as well.
"""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..layers import set_temperature
from ..safe_running import read_checkpoint

_BACKBONE = 'backbone.'
_TEMPERATURE = '.attention.temperature'
# Entries that the published files may lack.
_OPTIONAL = ('num_batches_tracked', _TEMPERATURE)
_SHOWN = 3
# What :func:`describe` gives as K of plain convolutions.
STATIC = 'none (static)'

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


def load_published_checkpoint(
    model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any]
) -> None:
    """Load a published checkpoint, completely or not at all.

    The temperature is set to 1, because the published training ends there. Counters
    (``num_batches_tracked``) that are not in the file keep their values.

    The function also accepts weights of a static ResNet or MobileNetV2 under torchvision's names,
    and makes banks of them that compute the same. They fit mmdet's ``ResNet`` and ``MobileNetV2``
    too.

    Args:
        model (nn.Module): An ``ODResNet`` or ``ODMobileNetV2``, or a detector with one as its
            ``backbone``. The file of a classifier fills the backbone of a detector, and the file
            of a detector fills the whole detector.
        source: A path, which is read in PyTorch's safe mode; the content of such a file; or a
            state dict.

    Raises:
        RuntimeError: The file does not fit, and the model is unchanged. Either K, the width or the
            depth differ (the message has both values), or entries are missing, left over or of
            another shape (the message has the first few names). Entries of the classifier do not
            matter.
        ValueError: The source has no state dict, or cannot be read
            (:func:`~mmdet_odconv.safe_running.read_checkpoint`).
    """
    content = source
    if isinstance(source, (str, os.PathLike)):
        content = read_checkpoint(os.fspath(source)).content
    entries, whole = _translated(state_dict_of(content))
    target = model if whole else getattr(model, 'backbone', model)
    expected = target.state_dict()
    static = describe(_backbone_of(entries)).get('K') == STATIC
    _require_fit(entries, _static_twin(expected) if static else expected)
    # Before the load: a bank made from a static kernel depends on it.
    set_temperature(target, 1.0)
    target.load_state_dict(entries, strict=False)


def export_published_checkpoint(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The weights of ``model`` under the published names.

    Args:
        model (nn.Module): An ``ODResNet`` or ``ODMobileNetV2``, or a detector with one as its
            ``backbone``.

    Returns:
        dict: ``{'state_dict': ...}`` as in the published files: the names of a backbone begin
        with ``module.``, and there is no classifier. The tensors are those of the model, not
        copies.

    Raises:
        ValueError: The backbone is neither of the two.
    """
    return {'state_dict': rename_to_published(model.state_dict())}


def rename_to_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a backbone or detector of ours under the published names.

    Raises:
        ValueError: The backbone is neither a ResNet nor a MobileNetV2.
    """
    whole = any(name.startswith(_BACKBONE) for name in state_dict)
    if not describe(_backbone_of(state_dict) if whole else state_dict):
        raise ValueError('only an ODResNet or ODMobileNetV2 has published names')
    # The published training ends at T = 1, and its files have no entry for it.
    published = {n: t for n, t in state_dict.items() if not n.endswith(_TEMPERATURE)}
    if not whole:
        return {f'module.{published_name(name)}': t for name, t in published.items()}
    return {
        f'{_BACKBONE}{published_name(name.removeprefix(_BACKBONE))}'
        if name.startswith(_BACKBONE)
        else name: tensor
        for name, tensor in published.items()
    }


def state_dict_of(content: Any) -> dict[str, Tensor]:
    """The state dict in what a checkpoint file holds.

    Raises:
        ValueError: There is none.
    """
    if isinstance(content, Mapping) and 'state_dict' in content:
        content = content['state_dict']
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(value, Tensor) for value in content.values())
    ):
        raise ValueError('there is no state dict in the checkpoint')
    return {str(name): value for name, value in content.items()}


def _translated(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """The entries under our names without the classifier's, and whether they are a detector's."""
    plain = {name.removeprefix('module.'): tensor for name, tensor in state_dict.items()}
    whole = any(name.startswith(_BACKBONE) for name in plain)
    prefix = _BACKBONE if whole else ''
    flat = is_flat(name.removeprefix(prefix) for name in plain)
    entries = {}
    for name, tensor in plain.items():
        if name.startswith(prefix):
            ours = backbone_name(name.removeprefix(prefix), flat)
            if ours is not None:
                entries[f'{prefix}{ours}'] = tensor
        else:
            entries[name] = tensor
    return entries, whole


def _static_twin(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries that the model would have with plain convolutions; of a bank, one kernel."""
    banks = {
        f'{name.partition(".attention.")[0]}.weight' for name in state_dict if '.attention.' in name
    }
    return {
        name: tensor[0] if name in banks else tensor
        for name, tensor in state_dict.items()
        if '.attention.' not in name
    }


def _require_fit(entries: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError unless names and shapes agree."""
    complaints = differences(_backbone_of(entries), _backbone_of(expected))
    if not complaints:
        missing = [name for name in expected if name not in entries]
        groups = {
            'missing': [n for n in missing if not n.endswith(_OPTIONAL)],
            'left over': [name for name in entries if name not in expected],
            'of another shape': [
                f'{name} ({tuple(tensor.shape)} in the file, {tuple(expected[name].shape)} in '
                'the model)'
                for name, tensor in entries.items()
                if name in expected and tensor.shape != expected[name].shape
            ],
        }
        complaints = [f'{what}: {_first(names)}' for what, names in groups.items() if names]
    frozen = any(
        name in entries and entries[name].dim() == expected[name].dim() + 1
        for name in expected
        if name.endswith('.weight')
    )
    if frozen and complaints and not any(STATIC in complaint for complaint in complaints):
        complaints.append(
            'published weights have ODConv in every stage, but the frozen stages of this model are '
            'plain: build it with frozen_stages=-1'
        )
    if complaints:
        raise RuntimeError(f'the published file does not fit the model: {"; ".join(complaints)}')


def _backbone_of(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's entries: all, or of a detector those under ``backbone.``."""
    inner = {
        name.removeprefix(_BACKBONE): tensor
        for name, tensor in state_dict.items()
        if name.startswith(_BACKBONE)
    }
    return inner or dict(state_dict)


def _first(names: Iterable[str]) -> str:
    names = list(names)
    more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
    return f'{", ".join(names[:_SHOWN])}{more}'


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
