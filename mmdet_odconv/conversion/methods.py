"""Methods of a converted model that must know of its dynamic layers: init_weights and fuse."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from mmengine.model import BaseModule
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import DynamicConvNd
from ..layers.attention import constant_affine


class InitWeights:
    """Runs the ``init_weights`` of a model's class in such a way that ODConv layers start well.

    mmengine's initialisation goes by the types and names that the static model has. In a
    converted one it would not reach the ODConv layers inside plain containers, and would reset
    layers after the model has set their biases. So each ODConv layer whose plain convolution would
    be initialised first initialises itself, then the model does what it does, and in the end the
    attentions start anew, save those of layers that a checkpoint
    (``init_cfg=dict(type='Pretrained', ...)``) was loaded into.

    What says that it is initialised stays as it is, as in mmengine.

    Args:
        model (nn.Module): A model with ``init_weights``.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self) -> None:
        layers = list(_uninitialised(self.model))
        for layer in layers:
            layer.init_weights()
        with _noting_loads(layers) as loaded, _skipped_by_mmengine(self.model):
            type(self.model).init_weights(self.model)
        for layer in layers:
            if layer not in loaded:
                layer.reset_attention()


def _uninitialised(module: Any, called: bool = True, reached: bool = False) -> Iterator[Any]:
    """The dynamic layers whose plain convolutions the initialisation of ``module`` would reach.

    Args:
        module (nn.Module): A model or a part of one.
        called (bool): Whether mmengine calls the ``init_weights`` of the parent.
        reached (bool): Whether a module above initialises more than it passes on to its children.
    """
    if getattr(module, 'is_init', False):
        return
    called = called and hasattr(module, 'init_weights')
    if called and (type(module).init_weights is not BaseModule.init_weights or module.init_cfg):
        reached = True
    for child in module.children():
        if not isinstance(child, DynamicConvNd):
            yield from _uninitialised(child, called, reached)
        elif reached:
            yield child


def patch_init_weights(model: Any) -> None:
    """Let ``model.init_weights()``, if there is one, go by :class:`InitWeights`."""
    if hasattr(model, 'init_weights') and not isinstance(model, DynamicConvNd):
        model.init_weights = InitWeights(model)


@contextmanager
def _noting_loads(layers: list[Any]) -> Iterator[set[nn.Module]]:
    """The layers among ``layers`` whose weights are loaded meanwhile."""
    loaded: set[nn.Module] = set()

    def note(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f'{prefix}weight' in state_dict:
            loaded.add(layer)

    with ExitStack() as handles:
        for layer in layers:
            handles.callback(
                layer._register_load_state_dict_pre_hook(note, with_module=True).remove
            )
        yield loaded


@contextmanager
def _skipped_by_mmengine(model: nn.Module) -> Iterator[None]:
    """Let mmengine's walk over the children not call the layers' own ``init_weights``."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, DynamicConvNd)]
    for layer in layers:
        layer.is_init = True
    try:
        yield
    finally:
        for layer in layers:
            del layer.is_init


def patch_fuse_methods(model: nn.Module) -> None:
    """Let the methods ``fuse`` of a model fold norms into its dynamic layers correctly.

    The models of Ultralytics, YOLOv5 and YOLOv7 have such a method, and call it themselves before
    validation and prediction. It treats the weight of a convolution as one kernel, but an ODConv
    layer has a bank of kernels. So each module that has a ``fuse`` and contains such a layer gets a
    new method: it first folds the norms of the blocks with dynamic layers, and then calls the
    method of its class, which finds these blocks fused already. Copies and pickles of the model
    keep the new method.

    :func:`~mmdet_odconv.convert_to_odconv` calls this function. Call it yourself if you put ODConv
    layers into a model by hand.

    Args:
        model (nn.Module): Any module.
    """
    for module in model.modules():
        if callable(getattr(type(module), 'fuse', None)) and any(_unfused_blocks(module)):
            own: Any = module
            own.fuse = partial(_fuse, module)


def _fuse(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    fuse_blocks(model)
    kind: Any = type(model)
    return kind.fuse(model, *args, **kwargs)


def fuse_blocks(model: nn.Module) -> None:
    """Fold the norms of blocks that would fold them into a dynamic layer themselves."""
    for block in list(_unfused_blocks(model)):
        norm = block.bn
        if isinstance(norm, _BatchNorm):
            affine = constant_affine(norm)
            if affine is None or not block.conv.fold_norm(*affine):
                raise RuntimeError(f'no norm can be folded into a {type(block.conv).__name__}')
        del block.bn
        block.forward = block.forward_fuse


def _unfused_blocks(model: nn.Module) -> Iterator[Any]:
    """Blocks of convolution, norm and activation whose fused form is a method ``forward_fuse``.

    Those whose norm is folded already count too, whatever their convolution.
    """
    for block in model.modules():
        children = block._modules
        conv, norm = children.get('conv'), children.get('bn')
        if hasattr(block, 'forward_fuse') and (
            isinstance(norm, nn.Identity)
            or (
                isinstance(conv, DynamicConvNd)
                and isinstance(norm, _BatchNorm)
                and norm.running_mean is not None
            )
        ):
            yield block
