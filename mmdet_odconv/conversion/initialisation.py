"""``init_weights`` of a converted model."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ..layers import DYNAMIC_TYPES


class InitWeights:
    """Runs the ``init_weights`` of a model's class in such a way that ODConv layers start well.

    mmengine's initialisation goes by the types and names that the static model has. In a
    converted one it would not reach the ODConv layers inside plain containers, and would reset
    layers after the model has set their biases. So each ODConv layer first initialises itself,
    then the model does what it does, and in the end the attentions start anew, save those of
    layers that a checkpoint (``init_cfg=dict(type='Pretrained', ...)``) was loaded into.

    Args:
        model (nn.Module): A model with ``init_weights``.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self) -> None:
        layers = [m for m in self.model.modules() if isinstance(m, DYNAMIC_TYPES)]
        for layer in layers:
            layer.init_weights()
        with _noting_loads(layers) as loaded, _skipped_by_mmengine(layers):
            type(self.model).init_weights(self.model)
        for layer in layers:
            if layer not in loaded:
                layer.attention.reset_parameters()


def keep_initialisation(model: Any) -> None:
    """Let ``model.init_weights()``, if there is one, go by :class:`InitWeights`."""
    if hasattr(model, 'init_weights') and not isinstance(model, DYNAMIC_TYPES):
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
def _skipped_by_mmengine(layers: list[Any]) -> Iterator[None]:
    """Let mmengine's walk over the children not call the layers' own ``init_weights``."""
    for layer in layers:
        layer.is_init = True
    try:
        yield
    finally:
        for layer in layers:
            del layer.is_init
