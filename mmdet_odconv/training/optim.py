"""Learning rates and weight decays of ODConv's attentions and kernel banks."""

import difflib
import inspect
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.logging import MMLogger, print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from terminaltables import AsciiTable
from torch import nn
from torch.optim import Optimizer

from .._checks import ArgumentError, check_number
from ..layers import DynamicConvNd

_OWN = ('attention_lr_mult', 'attention_decay_mult', 'bank_lr_mult')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ODConvOptimWrapperConstructor:
    """Sets the learning rates of the attentions and banks of ODConv layers.

    First, another constructor forms groups of parameters by its own rules. This constructor then
    finds the ODConv layers by their class and changes the rates and decays of these, before the
    optimizer is built:

    - The attention gets the bank's rate times ``attention_lr_mult``. This holds for its biases,
      too: a ``bias_lr_mult``, which is meant for the biases of a head, does not apply to them. Its
      decays, which may be special for biases and norms, are multiplied by
      ``attention_decay_mult``.
    - The bank's rate is multiplied by ``bank_lr_mult``, and its decay is divided by it, so that the
      two keep their balance.
    - The bank of a depthwise layer gets ``dwconv_decay_mult``, like a plain depthwise convolution.
    - What one of ``custom_keys`` sets stays as it is where the key means the attention but not the
      bank (``'attention'`` or ``'kernel_fc'``), or the bank but not the attention.

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
            ``bank_lr_mult``, the word 'compensated'; or another option has nearly its name; or the
            optimizer has no rate.
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
        self.custom_keys: dict[str, dict[str, Any]] = options.get('custom_keys') or {}
        self.wrapper = {'type': 'OptimWrapper', **optim_wrapper_cfg}
        self.optimizer: dict[str, Any] = self.wrapper.pop('optimizer')
        kind: Any = self.optimizer['type']
        with OPTIMIZERS.switch_scope_and_registry(None) as registry:
            self.optimizer_type = registry.get(kind) if isinstance(kind, str) else kind
        # The optimizer that the other constructor builds has its groups and does nothing with them.
        cfg = dict(optimizer=dict(self._defaults(), type=_Groups))
        self.base = OPTIM_WRAPPER_CONSTRUCTORS.build(
            dict(type=base, optim_wrapper_cfg=cfg, paramwise_cfg=options)
        )

    def __call__(self, model: nn.Module) -> OptimWrapper:
        model = getattr(model, 'module', model)
        with _without_lines_for_each_parameter():
            given = self.base(model).optimizer.param_groups
        group_of = groups_by_parameter(given)
        changed: dict[int, dict[str, float]] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, DynamicConvNd):
                changed |= self._changes(name, layer, group_of)
        groups: list[dict[str, Any]] = []
        for group in given:
            group.pop('param_names', None)  # of all its parameters
            rest = [p for p in group['params'] if id(p) not in changed]
            if rest:
                groups.append(group | {'params': rest})
            groups += [
                group | {'params': [p]} | changed[id(p)]
                for p in group['params']
                if id(p) in changed
            ]
        parameters = next(iter(inspect.signature(self.optimizer_type).parameters))
        optimizer = OPTIMIZERS.build({**self.optimizer, parameters: groups})
        wrapper: OptimWrapper = OPTIM_WRAPPERS.build(
            self.wrapper, default_args=dict(optimizer=optimizer)
        )
        table = _table(model, optimizer.param_groups)
        print_log(f'Learning rates:\n{table}', logger='current', level=logging.INFO)
        return wrapper

    def _defaults(self) -> dict[str, float]:
        """The rate and decay of a parameter without rules, as the optimizer itself sets them."""
        defaults = {}
        signature = inspect.signature(self.optimizer_type).parameters
        for name in ('lr', 'weight_decay'):
            default = signature[name].default if name in signature else inspect.Parameter.empty
            if name in self.optimizer or default is not inspect.Parameter.empty:
                defaults[name] = self.optimizer.get(name, default)
        if defaults.get('lr') is None:
            raise ArgumentError(f'set the lr of the optimizer {self.optimizer_type.__name__}')
        return defaults

    def _changes(
        self, name: str, layer: DynamicConvNd, group_of: dict[int, dict[str, Any]]
    ) -> dict[int, dict[str, float]]:
        """What differs from the groups of the other constructor, by parameter."""
        changes = {}
        bank = f'{name}.weight'
        attention = {
            f'{name}.{inner}': parameter
            for inner, parameter in layer.attention_parameters().items()
            if id(parameter) in group_of
        }
        bank_key = self._own_key(bank, attention)
        bank_group = group_of.get(id(layer.weight))
        rates = [group_of[id(p)]['lr'] for key, p in attention.items() if key.endswith('weight')]
        if bank_group is not None and 'lr_mult' not in bank_key:
            rates = [bank_group['lr']]
        for own_name, parameter in attention.items():
            group = group_of[id(parameter)]
            rate = (rates or [group['lr']])[0] * self.attention_lr_mult
            changes[id(parameter)] = _rates(
                group, rate, self.attention_decay_mult, self._own_key(own_name, [bank])
            )
        if bank_group is not None:
            factor = 1.0 if 'lr_mult' in bank_key else self._bank_factor(layer)
            decay_mult = 1 / factor if factor else 1.0
            if layer.groups == layer.in_channels:
                decay_mult *= self.dwconv_decay_mult
            changes[id(layer.weight)] = _rates(
                bank_group, bank_group['lr'] * factor, decay_mult, bank_key
            )
        return changes

    def _own_key(self, name: str, others: Collection[str]) -> dict[str, Any]:
        """What the custom key for a parameter sets, if it is for none of the others; else {}."""
        # Of the keys in a name, MMEngine takes the longest, and of these the first.
        for key in sorted(sorted(self.custom_keys), key=len, reverse=True):
            if key in name:
                return {} if any(key in other for other in others) else self.custom_keys[key]
        return {}

    def _bank_factor(self, layer: DynamicConvNd) -> float:
        if self.bank_lr_mult != 'compensated':
            return float(self.bank_lr_mult)
        return layer.compensation(_is_sgd({**self.optimizer, 'type': self.optimizer_type}))


class _Groups(Optimizer):
    """Groups of parameters with their rates and decays."""

    def __init__(self, params: Any, **defaults: float) -> None:
        super().__init__(params, defaults)


def groups_by_parameter(groups: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The group that each parameter of an optimizer is in, by the parameter's ``id``.

    Args:
        groups (list[dict]): The ``param_groups`` of the optimizer.
    """
    return {id(parameter): group for group in groups for parameter in group['params']}


def _is_sgd(optimizer: Any) -> bool:
    """Whether the config of an optimizer, or of one around another, says SGD."""
    if isinstance(optimizer, dict):
        return any(map(_is_sgd, optimizer.values()))
    kind = getattr(torch.optim, optimizer, None) if isinstance(optimizer, str) else optimizer
    return isinstance(kind, type) and issubclass(kind, torch.optim.SGD)


def _rates(
    group: dict[str, Any], rate: float, decay_mult: float, own: dict[str, Any]
) -> dict[str, float]:
    """A rate and a decay, except where the user's ``own`` key sets them."""
    rates = {} if 'lr_mult' in own else {'lr': rate}
    if 'weight_decay' in group and 'decay_mult' not in own:
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
        if isinstance(layer, DynamicConvNd):
            attention = layer.attention_parameters().values()
            kinds |= dict.fromkeys(map(id, attention), 'attentions of ODConv')
            kinds[id(layer.weight)] = 'kernel banks of ODConv'
    rates = {
        parameter: (f'{group["lr"]:.3g}', f'{group.get("weight_decay", 0):.3g}')
        for parameter, group in groups_by_parameter(groups).items()
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
