"""Replaces the dynamic layers of a trained model that do not move by plain convolutions."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn

from .._checks import check_number
from ..analysis import DYNAMIC, AttentionMeter, evaluation_mode, odconv_layers
from ..conversion.convert import replace_modules
from ..safe_running import unwrapped


@dataclass
class CollapseReport:
    """What :func:`collapse_static_layers` did.

    Attributes:
        threshold (float): The largest standard deviation of a layer that counts as static.
        std (dict[str, float]): Of each layer that was used, by name: the standard deviation over
            the images of the attention that varies most.
        collapsed (list[str]): The layers that are plain convolutions now.
        largest_change (float): Of all outputs over all images, relative to the root mean square of
            the output tensor that it is in.
    """

    threshold: float
    std: dict[str, float]
    collapsed: list[str] = field(default_factory=list)
    largest_change: float = 0.0

    def __str__(self) -> str:
        kept = [name for name in self.std if name not in self.collapsed]
        lines = [
            f'{len(self.collapsed)} of {len(self.std)} dynamic layers vary by less than '
            f'{self.threshold:g} over the images and are plain convolutions now; the outputs '
            f'changed by at most {self.largest_change:.2g} of their size.'
        ]
        if kept:
            largest = max(kept, key=lambda name: self.std[name])
            lines.append(
                f'{len(kept)} stay dynamic; {largest} varies most, by {self.std[largest]:.2g}.'
            )
        return '\n'.join(lines)


def collapse_static_layers(
    model: nn.Module,
    images: Iterable[Any],
    threshold: float = DYNAMIC,
    forward: Callable[[Any], Any] | None = None,
) -> CollapseReport:
    """Replace each dynamic layer whose attentions hardly depend on the image by a plain one.

    A layer that does not move costs time and K kernels of memory for nothing. The plain
    convolution that takes its place has the kernel that the bank gives with the attentions at
    their means over ``images``. Layers that ``images`` do not reach stay as they are.

    Args:
        model (nn.Module): A trained model; it is changed in place and is in the mode in which it
            was.
        images (Iterable): Inputs of ``forward``, one for each call. Some tens of images of the
            kind that the model is for will do.
        threshold (float): A layer is static if no attention of it has a larger standard deviation
            over the images (averaged over its values). Default: 0.003.
        forward (Callable, optional): Runs the model on one of the inputs. Default: the model
            itself.

    Returns:
        CollapseReport: The deviations, what was replaced, and how far the outputs moved.

    Raises:
        ValueError: The model has no dynamic layer, no layer was used, or the threshold is negative.
    """
    if check_number('threshold', threshold) < 0:
        raise ValueError(f'threshold must be at least 0, got {threshold}')
    run, inputs = forward or model, list(images)
    modes = {name: layer.training for name, layer in odconv_layers(model).items()}
    with evaluation_mode(model), torch.no_grad():
        with AttentionMeter(model) as meter:
            before = [list(_tensors(run(each))) for each in copy.deepcopy(inputs)]
        meter.all_reduce()
        report = CollapseReport(threshold, {s.name: s.largest_std for s in meter.statistics()})
        if not report.std:
            raise ValueError('no dynamic layer was used: no images were given')
        means = meter.means()
        plain: dict[nn.Module, nn.Module] = {}
        for name, std in report.std.items():
            layer = meter.layers[name]
            conv = _at_means(layer, means[name]) if std <= threshold else None
            if conv is not None:
                plain[layer] = conv.train(modes[name])
                report.collapsed.append(name)
        replace_modules(unwrapped(model), plain)
        for each, old in zip(inputs, before, strict=True):
            for one, other in zip(old, _tensors(run(each)), strict=True):
                change = (other - one).abs().max() / one.square().mean().sqrt()
                report.largest_change = max(report.largest_change, change.item())
        largest = torch.tensor(report.largest_change)
        all_reduce(largest, 'max')
        report.largest_change = largest.item()
    return report


def _at_means(layer: Any, means: dict[str, Tensor]) -> nn.Module | None:
    """The plain convolution that ``layer`` is with these attentions, None if it is none."""
    found = layer.at_attentions(means)
    if found is None:
        return None
    weight, bias = found
    conv: Any = layer.plain_convolution()
    conv.weight.copy_(weight)
    if bias is not None:
        conv.bias.copy_(bias)
    return conv


def _tensors(outputs: Any) -> Iterator[Tensor]:
    """The tensors of floating type in nested sequences and dicts."""
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point() and outputs.numel():
            yield outputs
    elif isinstance(outputs, dict):
        for each in outputs.values():
            yield from _tensors(each)
    elif isinstance(outputs, Sequence) and not isinstance(outputs, str):
        for each in outputs:
            yield from _tensors(each)
