"""Parameters and multiply-adds of a model with ODConv layers, counted by MMEngine's analyser."""

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from mmengine.analysis import FlopAnalyzer, parameter_count
from torch import Tensor, nn

from .analysis import evaluation_mode
from .layers import ODAttention
from .layers.attention import PreparedAttention
from .layers.odconv import _ODConvNd

# Norms can be folded into convolutions, and the others are a few operations for each output.
_UNCOUNTED = (
    'batch_norm',
    'group_norm',
    'layer_norm',
    'instance_norm',
    'upsample_nearest2d',
    'upsample_bilinear2d',
    'adaptive_avg_pool2d',
    'grid_sampler',
)
_PLAIN: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Complexity(NamedTuple):
    """What a module costs, its children included.

    Attributes:
        parameters (int): Parameters.
        convolution (int): Multiply-adds of convolutions and other matrix products.
        mixture (int): Multiply-adds of the mixtures of kernel banks: K for each entry of a kernel
            and each sample.
        attention (int): Multiply-adds of the attention branches.
    """

    parameters: int
    convolution: int
    mixture: int
    attention: int

    @property
    def multiply_adds(self) -> int:
        """All multiply-adds."""
        return self.convolution + self.mixture + self.attention


def count_complexity(model: nn.Module, *inputs: Tensor, **others: Any) -> dict[str, Complexity]:
    """Count what one forward pass costs, module by module.

    A multiplication and the addition of its result are counted as one operation. Norms,
    activations, resizing, the average before an attention and products with single factors
    (c ⊙ x, s ⊙ W, f ⊙ y) are not counted.

    Args:
        model (nn.Module): A model, which is traced in evaluation mode.
        *inputs (Tensor): The tensors that its forward method takes.
        **others: What else that takes.

    Returns:
        dict[str, Complexity]: The costs by the dotted name of the module; '' is the whole model.
    """
    analyser = FlopAnalyzer(model, inputs)
    for name in _UNCOUNTED:
        # The handle None would leave MMEngine's own in its place.
        analyser.set_op_handle(f'aten::{name}', lambda inputs, outputs: 0)
    analyser.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analyser.tracer_warnings('none')
    own = vars(model).get('forward')
    model.forward = partial(model.forward, **others)  # a trace takes nothing but tensors
    try:
        with evaluation_mode(model), torch.no_grad():
            total, by_operator = analyser.by_module(), analyser.by_module_and_operator()
    finally:
        del model.forward
        if own is not None:
            model.forward = own
    parameters = parameter_count(model)
    mixtures, attentions = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, ODAttention | PreparedAttention):
            attentions[name] = total[name]
        elif isinstance(module, _ODConvNd):
            mixtures[name] = by_operator[name]['matmul']
    found = {}
    for name, _ in model.named_modules():
        mixture, attention = (_within(name, parts) for parts in (mixtures, attentions))
        convolution = total[name] - mixture - attention
        found[name] = Complexity(parameters[name], convolution, mixture, attention)
    return found


def _within(name: str, parts: dict[str, int]) -> int:
    """The sum over those ``parts`` that are the module ``name`` or lie in it."""
    inside = f'{name}.' if name else ''
    return sum(n for part, n in parts.items() if part == name or part.startswith(inside))


def plain_twin(model: nn.Module) -> nn.Module:
    """A copy of a model with plain convolutions, with new weights, in place of ODConv layers."""
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, _ODConvNd):
                setattr(parent, name, _plain(layer))
    return twin


def _plain(layer: _ODConvNd) -> nn.Module:
    plain: nn.Module = _PLAIN[layer.ndim](
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.bias is not None,
        layer.padding_mode,
        layer.weight.device,
        layer.weight.dtype,
    )
    return plain
