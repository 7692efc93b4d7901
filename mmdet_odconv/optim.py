"""Learning rates and weight decays of ODConv's attentions and kernel banks."""

import difflib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.logging import MMLogger, print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from terminaltables import AsciiTable
from torch import nn

from .functional.arguments import ArgumentError, check_number
from .layers.odconv import _ODConvNd

_OWN = ('attention_lr_mult', 'attention_decay_mult', 'bank_lr_mult')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ODConvOptimWrapperConstructor:
    """Sets the learning rates of the attentions and banks of ODConv layers.

    First, another constructor sets the rates and decays of all parameters by its own rules. This
    constructor then finds the ODConv layers by their class and changes these:

    - The attention gets the bank's rate times ``attention_lr_mult``. This holds for its biases,
      too: a ``bias_lr_mult``, which is meant for the biases of a head, does not apply to them. Its
      decays, which may be special for biases and norms, are multiplied by
      ``attention_decay_mult``.
    - The bank's rate is multiplied by ``bank_lr_mult``, and its decay is divided by it, so that the
      two keep their balance.
    - The bank of a depthwise layer gets ``dwconv_decay_mult``, like a plain depthwise convolution.

    A table of the rates goes to the log, in place of the one or two lines for each parameter that
    MMEngine's own constructor writes.

    Example::

        optim_wrapper = dict(
            constructor='ODConvOptimWrapperConstructor',
            paramwise_cfg=dict(attention_lr_mult=0.1),
        )

    Args:
        optim_wrapper_cfg (dict): Config of the optimizer wrapper.
        paramwise_cfg (dict, optional): The options of the other constructor, and these:

            - ``base`` (str): The type of the other constructor. Default:
              'DefaultOptimWrapperConstructor'.
            - ``attention_lr_mult`` (float): See above. Default: 1.
            - ``attention_decay_mult`` (float): See above. Default: 1.
            - ``bank_lr_mult`` (float | str): A number, or 'compensated' for banks that start from
              static weights. Let a be the product of the constant attentions of the 'zero' start.
              Under SGD, a step changes the function of a bank a²/K times as much as that of one
              static kernel, so the factor is K/a². An optimizer that normalises its steps changes
              all entries alike, but the kernels of the bank are √(1 + spread²)/a times as large as
              the static one, and this is the factor. Default: 1.

    Raises:
        ValueError: One of the three multipliers is not a number of at least 0, nor, for
            ``bank_lr_mult``, the word 'compensated'; or another option has nearly its name.
    """

    def __init__(
        self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None
    ) -> None:
        options = dict(paramwise_cfg or {})
        base = options.pop('base', 'DefaultOptimWrapperConstructor')
        values = {name: options.pop(name, 1.0) for name in _OWN}
        for name, value in values.items():
            if name == 'bank_lr_mult' and value == 'compensated':
                continue
            if isinstance(value, str) and name == 'bank_lr_mult':
                raise ArgumentError(f"{name} must be a number or 'compensated', got {value!r}")
            if check_number(name, value) < 0:
                raise ArgumentError(f'{name} must be at least 0, got {value}')
        for name in options:  # constructors take no notice of what they do not know
            near = difflib.get_close_matches(name, _OWN, n=1, cutoff=0.85)
            if near:
                raise ArgumentError(f'there is no option {name!r}; is it {near[0]!r}?')
        self.attention_lr_mult, self.attention_decay_mult, self.bank_lr_mult = values.values()
        self.dwconv_decay_mult = options.get('dwconv_decay_mult', 1.0)
        self.base = OPTIM_WRAPPER_CONSTRUCTORS.build(
            dict(type=base, optim_wrapper_cfg=optim_wrapper_cfg, paramwise_cfg=options)
        )

    def __call__(self, model: nn.Module) -> OptimWrapper:
        with _without_lines_for_each_parameter():
            wrapper: OptimWrapper = self.base(model)
        optimizer = wrapper.optimizer
        group_of = {id(p): group for group in optimizer.param_groups for p in group['params']}
        changed: dict[int, dict[str, float]] = {}
        for layer in model.modules():
            if isinstance(layer, _ODConvNd):
                changed |= self._changes(layer, group_of, optimizer)
        groups: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            rest = [p for p in group['params'] if id(p) not in changed]
            if rest:
                groups.append(group | {'params': rest})
            groups += [
                group | {'params': [p]} | changed[id(p)]
                for p in group['params']
                if id(p) in changed
            ]
        optimizer.param_groups = groups
        table = _table(model, groups)
        print_log(f'Learning rates:\n{table}', logger='current', level=logging.INFO)
        return wrapper

    def _changes(
        self, layer: _ODConvNd, group_of: dict[int, dict[str, Any]], optimizer: Any
    ) -> dict[int, dict[str, float]]:
        """What differs from the groups of the other constructor, by parameter."""
        changes = {}
        bank_group = group_of.get(id(layer.weight))
        for parameter in layer.attention.parameters():
            group = group_of.get(id(parameter))
            if group is not None:
                rate = (bank_group or group)['lr']
                changes[id(parameter)] = _rates(
                    group, rate * self.attention_lr_mult, self.attention_decay_mult
                )
        if bank_group is not None:
            factor = self._bank_factor(layer, optimizer)
            decay_mult = 1 / factor if factor else 1.0
            if layer.groups == layer.in_channels:
                decay_mult *= self.dwconv_decay_mult
            changes[id(layer.weight)] = _rates(bank_group, bank_group['lr'] * factor, decay_mult)
        return changes

    def _bank_factor(self, layer: _ODConvNd, optimizer: Any) -> float:
        if self.bank_lr_mult != 'compensated':
            return float(self.bank_lr_mult)
        attention = layer.attention.constant_product()
        if isinstance(optimizer, torch.optim.SGD):
            return layer.kernel_num / attention**2
        spread = layer.spread if layer.kernel_num > 1 else 0.0
        return math.hypot(1, spread) / attention


def _rates(group: dict[str, Any], rate: float, decay_mult: float) -> dict[str, float]:
    rates = {'lr': rate}
    if 'weight_decay' in group:
        rates['weight_decay'] = group['weight_decay'] * decay_mult
    return rates


@contextmanager
def _without_lines_for_each_parameter() -> Iterator[None]:
    """Keep the messages of MMEngine's constructor about single parameters out of the log."""

    def is_other(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not ('paramwise_options -- ' in text or 'is skipped since its requires_grad' in text)

    logger = MMLogger.get_current_instance()
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _table(model: nn.Module, groups: list[dict[str, Any]]) -> str:
    """How many parameters have which rate and decay, kernel banks and attentions apart."""
    kinds: dict[int, str] = {}
    for layer in model.modules():
        if isinstance(layer, _ODConvNd):
            kinds |= dict.fromkeys(map(id, layer.attention.parameters()), 'attentions of ODConv')
            kinds[id(layer.weight)] = 'kernel banks of ODConv'
    rates = {
        id(parameter): (f'{group["lr"]:.3g}', f'{group.get("weight_decay", 0):.3g}')
        for group in groups
        for parameter in group['params']
    }
    rows: dict[tuple[str, ...], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        kind = kinds.get(id(parameter), 'all else')
        row: tuple[str, ...] = (kind, *rates.get(id(parameter), ('not trained', '')))
        rows.setdefault(row, []).append((name, parameter))
    cells = [['', 'rate', 'weight decay', 'tensors', 'parameters', 'such as']]
    for row in sorted(rows, key=lambda row: -len(rows[row])):
        numbers = sum(parameter.numel() for _, parameter in rows[row])
        cells.append([*row, str(len(rows[row])), f'{numbers / 1e6:.2f} M', rows[row][0][0]])
    return AsciiTable(cells).table
