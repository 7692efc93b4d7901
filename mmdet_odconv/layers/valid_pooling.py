"""Attentions that do not depend on the padding of a batch.

Images of a batch are padded to one size. The average that the attentions are computed from takes
the padding in, so the same image gets other kernels in other company. Here the average runs over
each image's own part of the map instead.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import not_compiled
from ..functional import at_least_float32


class ValidSizes:
    """The sizes of the images in the batch that a model is working on.

    The model sets them, and its ODConv layers read them. Threads that use the model at the same
    time have sizes of their own.

    After a training step the sizes stay until the next one, because gradient checkpointing
    computes the layers again in the backward pass, on a GPU in a thread of PyTorch's own. With
    checkpointing, each forward pass therefore needs its backward pass before the next one.
    """

    def __init__(self) -> None:
        self._by_thread: dict[int, Tensor] = {}
        self._latest: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> 'ValidSizes':
        return memo.setdefault(id(self), ValidSizes())

    def __reduce__(self) -> tuple[Any, ...]:
        return ValidSizes, ()

    @not_compiled
    def before_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Take the sizes from the arguments of a detector of mmdet: images and data samples."""
        inputs = kwargs.get('inputs', args[0] if args else None)
        samples = kwargs.get('data_samples', args[1] if len(args) > 1 else None)
        self._set(_fractions(inputs, samples), keep=model.training)

    def after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forget the sizes, unless a backward pass may need them."""
        if not model.training:
            self._set(None, keep=False)

    def _set(self, fractions: Tensor | None, keep: bool) -> None:
        self._by_thread.pop(threading.get_ident(), None)
        if fractions is not None:
            self._by_thread[threading.get_ident()] = fractions
        self._latest = fractions if keep else None

    @torch.compiler.disable
    def average(self, x: Tensor) -> Tensor | None:
        """The averages over the images' own parts of a map; None where the whole map is valid.

        Args:
            x (Tensor): Shape (B, C, H, W).

        Returns:
            Tensor | None: Shape (B, C, 1, 1), float32 or wider.
        """
        fractions = self._by_thread.get(threading.get_ident(), self._latest)
        if fractions is None or len(fractions) != len(x):
            return None
        height, width = x.shape[2:]
        valid = (fractions * fractions.new_tensor([height, width])).sub(1e-4).ceil()
        rows = torch.arange(height) < valid[:, :1]
        columns = torch.arange(width) < valid[:, 1:]
        weight = (rows / valid[:, :1])[:, :, None] * (columns / valid[:, 1:])[:, None]
        wide = x.to(at_least_float32(x.dtype))
        weight = weight.to(wide.device, wide.dtype)
        return torch.einsum('bchw,bhw->bc', wide, weight)[:, :, None, None]


def _fractions(inputs: Any, samples: Any) -> Tensor | None:
    """Which part of the height and width of each input its image takes, shape (B, 2), on the CPU.

    None where that is unknown, or where all images fill their inputs.
    """
    if not isinstance(inputs, Tensor) or inputs.dim() != 4 or not isinstance(samples, Sequence):
        return None
    shapes: list[Any] = [getattr(sample, 'img_shape', None) for sample in samples]
    if None in shapes or len(shapes) != len(inputs):
        return None
    sizes = torch.tensor([shape[:2] for shape in shapes], dtype=torch.float64)
    fractions = sizes / torch.tensor(inputs.shape[2:])
    known = bool(((fractions > 0) & (fractions <= 1)).all())
    return fractions if known and bool((fractions < 1).any()) else None


def use_valid_pooling(model: nn.Module) -> int:
    """Let the attentions of a detector leave out the padding of its batches.

    The detector must have the arguments of mmdet's detectors: ``inputs``, a batch of images, and
    ``data_samples`` with the ``img_shape`` of each image without the padding of the batch. If they
    are not given, the average is taken over the whole map, as by default. Padding that a ``Pad`` in
    the data pipeline adds is not left out, because mmdet counts it as part of the image.

    Published weights were trained with averages over the whole map.

    Args:
        model (nn.Module): The detector, without wrappers. It is changed in place.

    Returns:
        int: The number of layers that now leave out the padding. These are all ODConv layers
        except those in a ``roi_head``, whose batch consists of regions and not of images.

    Raises:
        ValueError: The model has no such layer, or has valid pooling already.
    """
    layers = [
        module
        for name, module in model.named_modules()
        if getattr(module, 'ndim', None) == 2
        and hasattr(module, 'valid_sizes')
        and 'roi_head' not in name.split('.')
    ]
    if not layers:
        raise ValueError(f'{type(model).__name__} has no 2-D ODConv layer that pools whole images')
    if any(layer.valid_sizes is not None for layer in layers):
        raise ValueError(f'{type(model).__name__} has valid pooling already')
    sizes = ValidSizes()
    model.register_forward_pre_hook(sizes.before_forward, with_kwargs=True)
    model.register_forward_hook(sizes.after_forward, always_call=True)
    for layer in layers:
        layer.valid_sizes = sizes
    return len(layers)
