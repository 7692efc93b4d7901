"""Parameters and multiply-adds of a model with ODConv layers, counted by MMEngine's analyser."""

import copy
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import torch
from mmengine.analysis import FlopAnalyzer, parameter_count
from torch import Tensor, nn

from ..layers import DynamicConvNd
from .attentions import evaluation_mode

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


class Complexity(NamedTuple):
    """What a module costs, its children included.

    Attributes:
        parameters (int): Parameters.
        convolution (int): Multiply-adds of convolutions and other matrix products.
        mixture (int): Multiply-adds that make the kernels, for ODConv K for each entry of a kernel
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
    layers = {n: m for n, m in model.named_modules() if isinstance(m, DynamicConvNd)}
    samples: Counter[str] = Counter()

    def counter(name: str) -> Any:
        return lambda layer, args: samples.update({name: int(args[0].shape[0])})

    handles = [layer.register_forward_pre_hook(counter(n)) for n, layer in layers.items()]
    try:
        with evaluation_mode(model), torch.no_grad():
            total, by_operator = analyser.by_module(), analyser.by_module_and_operator()
    finally:
        for handle in handles:
            handle.remove()
        del model.forward
        if own is not None:
            model.forward = own
    parameters = parameter_count(model)
    products, uncounted, attentions = {}, {}, {}
    for name, layer in layers.items():
        products[name] = by_operator[name]['matmul']
        uncounted[name] = samples[name] * layer.uncounted_madds()
        for child, _ in layer.named_children():
            path = f'{name}.{child}' if name else child
            attentions[path] = total[path]
    found = {}
    for name, _ in model.named_modules():
        mixture, attention = (_within(name, parts) for parts in (products, attentions))
        convolution = total[name] - mixture - attention
        mixture += _within(name, uncounted)
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
            if isinstance(layer, DynamicConvNd):
                setattr(parent, name, layer.plain_convolution())
    return twin
