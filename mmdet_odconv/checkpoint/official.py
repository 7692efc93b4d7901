"""The published checkpoints, into our models and back.

Published are ImageNet classifiers (OD-ResNet, OD-MobileNetV2) and detectors of MMDetection 2
(Faster and Mask R-CNN). MMDetection 3 has left the names of those detectors' necks and heads as
they were, so only the backbone's are translated.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..layers import set_temperature
from .architecture import STATIC, describe, differences
from .published import backbone_name, is_flat, published_name
from .reading import read_checkpoint

_BACKBONE = 'backbone.'
_TEMPERATURE = '.attention.temperature'
# Entries that the published files may lack.
_OPTIONAL = ('num_batches_tracked', _TEMPERATURE)
_SHOWN = 3


def load_official_checkpoint(
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
            (:func:`~mmdet_odconv.checkpoint.read_checkpoint`).
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


def export_official_checkpoint(model: nn.Module) -> dict[str, dict[str, Tensor]]:
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
