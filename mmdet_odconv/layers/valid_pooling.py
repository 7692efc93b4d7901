"""Attentions that do not depend on the padding of a batch.

Images of a batch are padded to one size. The average that the attentions are computed from takes
the padding in, so the same image gets other kernels in other company. Here the average runs over
each image's own part of the map instead.
"""

import functools
import inspect
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from ..functional import at_least_float32

# The first two parameters of the methods that get images with their data samples, in mmdet and
# mmseg: forward, loss, predict and others.
_IMAGES, _SAMPLES = ('inputs', 'batch_inputs'), ('data_samples', 'batch_data_samples')


class _Call:
    """A call with images: the images, what part of each is valid, and if the maps are theirs."""

    def __init__(self, images: Tensor, samples: Any) -> None:
        self.images = images
        self.fractions = _fractions(images, samples)
        self.is_on_whole_images = True


class ValidSizes:
    """The sizes of the images in the batch that a model is working on.

    They belong to a call: the model's methods that get data samples set them, the ODConv layers
    read them, and outside of such a call there are none. Threads that use the model at the same
    time have sizes of their own. Gradient checkpointing computes layers again in the backward pass,
    where the losses of each call bring its sizes back.
    """

    def __init__(self) -> None:
        self._thread = threading.local()
        self._backward: tuple[int, Tensor | None] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> 'ValidSizes':
        return memo.setdefault(id(self), ValidSizes())

    def __reduce__(self) -> tuple[Any, ...]:
        return ValidSizes, ()

    def run(self, method: Any, images: Any, samples: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a model's ``method`` with these arguments, with the sizes of its images."""
        outer = getattr(self._thread, 'call', None)
        if not isinstance(images, Tensor) or (outer is not None and outer.images is images):
            return method(*args, **kwargs)
        self._thread.call = call = _Call(images, samples)
        try:
            outputs = method(*args, **kwargs)
        finally:
            self._thread.call = outer
        for tensor in _tensors(outputs):
            if tensor.grad_fn is not None:
                tensor.register_hook(lambda _, sizes=call.fractions: self._in_backward(sizes))
        return outputs

    @torch.compiler.disable
    def before_backbone(self, backbone: nn.Module, args: tuple[Any, ...]) -> None:
        """Use the sizes only where the backbone gets the images themselves, and not crops."""
        call = getattr(self._thread, 'call', None)
        if call is not None and args and isinstance(args[0], Tensor):
            call.is_on_whole_images = args[0].shape == call.images.shape

    def _in_backward(self, fractions: Tensor | None) -> None:
        """Hold these sizes for what the backward pass computes again, until it ends."""
        task = torch._C._current_graph_task_id()
        if self._backward is None or self._backward[0] != task:
            Variable._execution_engine.queue_callback(self._end_of_backward)
        self._backward = task, fractions

    def _end_of_backward(self) -> None:
        self._backward = None

    def _current(self) -> Tensor | None:
        call = getattr(self._thread, 'call', None)
        if call is not None:
            return call.fractions if call.is_on_whole_images else None
        # Within it, a reentrant checkpoint has a backward pass of its own, with a higher number.
        if self._backward is None or torch._C._current_graph_task_id() < self._backward[0]:
            return None
        return self._backward[1]

    @torch.compiler.disable
    def average(self, x: Tensor) -> Tensor | None:
        """The averages over the images' own parts of a map; None where the whole map is valid.

        Args:
            x (Tensor): Shape (B, C, H, W).

        Returns:
            Tensor | None: Shape (B, C), float32 or wider.
        """
        fractions = self._current()
        if fractions is None or len(fractions) != len(x):
            return None
        height, width = x.shape[2:]
        valid = (fractions * fractions.new_tensor([height, width])).sub(1e-4).ceil()
        rows = torch.arange(height) < valid[:, :1]
        columns = torch.arange(width) < valid[:, 1:]
        weight = (rows / valid[:, :1])[:, :, None] * (columns / valid[:, 1:])[:, None]
        wide = x.to(at_least_float32(x.dtype))
        weight = weight.to(wide.device, wide.dtype)
        return torch.einsum('bchw,bhw->bc', wide, weight)


class _Method:
    """A method of a model that gets images and data samples, run by :meth:`ValidSizes.run`."""

    def __init__(self, sizes: ValidSizes, model: nn.Module, name: str) -> None:
        self.sizes, self.model, self.name = sizes, model, name

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = getattr(type(self.model), self.name)
        names = [*inspect.signature(method).parameters][1:3]
        images, samples = (
            args[i] if len(args) > i else kwargs.get(name) for i, name in enumerate(names)
        )
        return self.sizes.run(method, images, samples, self.model, *args, **kwargs)


@functools.cache
def _methods_with_samples(kind: Any) -> list[str]:
    methods = []
    for name, function in inspect.getmembers(kind, inspect.isfunction):
        names = [*inspect.signature(function).parameters][1:3]
        if len(names) == 2 and names[0] in _IMAGES and names[1] in _SAMPLES:
            methods.append(name)
    return methods


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, (dict, list, tuple)):
        for item in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from _tensors(item)


def _fractions(inputs: Tensor, samples: Any) -> Tensor | None:
    """Which part of the height and width of each input its image takes, shape (B, 2), on the CPU.

    None where that is unknown, or where all images fill their inputs.
    """
    if inputs.dim() != 4 or not isinstance(samples, Sequence):
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

    The sizes of the images without the padding are the ``img_shape`` of the data samples that a
    method such as ``forward``, ``loss`` or ``predict`` gets with the images. This holds for each
    detector in the model, as the student and the teacher of a ``SoftTeacher`` are. Without data
    samples, and where the backbone gets other maps than these images (windows of them, for
    example), the average is taken over the whole map, as by default. Padding that a ``Pad`` in
    the data pipeline adds is not left out, because mmdet counts it as part of the image.

    Published weights were trained with averages over the whole map.

    Args:
        model (nn.Module): The detector, without wrappers. It is changed in place.

    Returns:
        int: The number of layers that now leave out the padding. These are all ODConv layers
        except those in a ``roi_head``, whose batch consists of regions and not of images.

    Raises:
        ValueError: The model has no such layer, no method that gets images with data samples, or
            has valid pooling already.
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
    modules: list[Any] = [*model.modules()]
    methods = [(m, name) for m in modules for name in _methods_with_samples(m.__class__)]
    if not methods:
        raise ValueError(f'{type(model).__name__} has no method with images and data samples')
    sizes = ValidSizes()
    for module, name in methods:
        setattr(module, name, _Method(sizes, module, name))
    for module in dict.fromkeys(module for module, _ in methods):
        backbone: Any = getattr(module, 'backbone', None)
        if isinstance(backbone, nn.Module):
            backbone.register_forward_pre_hook(sizes.before_backbone)
    for layer in layers:
        layer.valid_sizes = sizes
    return len(layers)
