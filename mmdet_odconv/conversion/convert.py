"""Conversion of a built model: plain convolutions become ODConv layers, in place."""

import difflib
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.registry import MODELS
from terminaltables import AsciiTable
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._checks import ArgumentError, check_integer
from ..layers import CalibratedNorm, DynamicConvNd, ODConv1d, ODConv2d, ODConv3d
from .methods import patch_fuse_methods, patch_init_weights
from .rules import (
    REPLACEABLE,
    ConversionError,
    Patterns,
    Selection,
    Site,
    blocking_reason,
    default_exclusion,
    find_convolutions,
    held_outside_the_tree,
    serves_several_levels,
)

# What PyTorch keeps of a module's hooks; those on its state dict belong to the static weight.
_HOOKS = (
    '_forward_hooks',
    '_forward_hooks_with_kwargs',
    '_forward_hooks_always_called',
    '_forward_pre_hooks',
    '_forward_pre_hooks_with_kwargs',
    '_backward_hooks',
    '_backward_pre_hooks',
    '_is_full_backward_hook',
)


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert_to_odconv` did to a model.

    ``str(report)`` is a table of groups of convolutions, and :meth:`details` is a table with all
    names.

    Attributes:
        converted (list[str]): The names of the convolutions that are ODConv now. A convolution that
            is used at several places is listed once, under its first name.
        kept (list[tuple[str, str]]): The names of the other convolutions, each with the reason.
        parameters_before (int): Parameters of the whole model before.
        parameters_after (int): Parameters of the whole model after.
    """

    converted: list[str]
    kept: list[tuple[str, str]]
    parameters_before: int
    parameters_after: int

    def reasons(self) -> dict[str, int]:
        """How many convolutions were kept for each reason, the most frequent first."""
        return dict(Counter(reason for _, reason in self.kept).most_common())

    def details(self) -> str:
        """A table with one row for each convolution."""
        rows = [[name, 'converted'] for name in self.converted]
        rows += [[name, f'kept: {reason}'] for name, reason in self.kept]
        return f'{_table([["convolution", ""], *rows])}\n{self._parameters()}'

    def __str__(self) -> str:
        rows = [['', 'convolutions', 'names (* is any number)']]
        rows.append(['converted', str(len(self.converted)), _shortened(self.converted)])
        for reason, number in self.reasons().items():
            names = [name for name, why in self.kept if why == reason]
            rows.append([f'kept: {reason}', str(number), _shortened(names)])
        return f'{_table(rows)}\n{self._parameters()}'

    def summary(self) -> str:
        """The numbers in one line."""
        return (
            f'{len(self.converted)} convolutions converted, {len(self.kept)} kept; '
            f'{self._parameters()}'
        )

    def _parameters(self) -> str:
        before, after = self.parameters_before / 1e6, self.parameters_after / 1e6
        return f'parameters: {before:.2f} M before, {after:.2f} M after'


def convert_to_odconv(
    model: nn.Module,
    kernel_num: int | None = None,
    include: Patterns = 'backbone',
    exclude: Patterns = (),
    min_channels: int = 1,
    layer: str | type = 'ODConv',
    **odconv_args: Any,
) -> ConversionReport:
    """Replace plain convolutions of ``model`` with ODConv layers that compute the same, in place.

    The function replaces ``nn.Conv1d/2d/3d`` and mmcv's wrappers of them, but no subclass that
    changes their behaviour. A convolution that is used at several places becomes one layer. Each
    layer starts from the weights of its convolution and takes over its forward and backward hooks,
    training mode, device, type and ``requires_grad``; its attention gets the same
    ``requires_grad``.

    Convert the model before you build an optimizer, because an optimizer keeps the parameters that
    it was given.

    Frozen stages stay plain, as in this package's backbones. Frozen are convolutions whose weights
    need no gradient, in a part of the model that has other weights which do. Convolutions of the
    same names in a copy of that part (the teacher of a student) stay plain, too.

    Stems, patch embeddings, 1×1 shortcuts, convolutions of channel attentions and the prediction
    layers of heads (:func:`~mmdet_odconv.conversion.rules.default_exclusion`) stay plain unless a
    pattern of ``include`` asks for them. A pattern asks for them if it is found in the
    convolution's name but not in the name of the backbone, head or block that it belongs to. For
    example, 'downsample' asks for shortcuts and 'retina_cls' for a prediction layer; 'backbone' and
    '.*' ask for neither.

    If the model has a method ``fuse``, like Ultralytics' models, that method still folds norms
    correctly (:func:`~mmdet_odconv.conversion.patch_fuse_methods`).

    Args:
        model (nn.Module): A detector or any other model.
        kernel_num (int, optional): K, kernels in each bank. Default: that of the layer, which is 4
            for ODConv.
        include (str | Sequence[str]): Regular expressions. A convolution is replaced if one of
            them is found in its dotted name. Default: 'backbone'.
        exclude (str | Sequence[str]): Regular expressions. A convolution stays plain if one of them
            is found in its dotted name. Default: none.
        min_channels (int): Convolutions with fewer input or output channels stay plain.
            Default: 1.
        layer (str | type): Type of the new layers: 'ODConv', or the name or class of any registered
            dynamic convolution, such as 'FDConv2d', 'CondConv2d', 'DyConv2d' or one of your own,
            which replaces the convolutions of its number of dimensions. Default: 'ODConv'.
        **odconv_args: Further arguments of the layer, with its own meanings and defaults, for
            example ``reduction=1 / 4`` or ``norm_cfg=dict(type='LN')``
            (:class:`~mmdet_odconv.ODConv2d`).

    Returns:
        ConversionReport: What was converted, and what was kept and why.

    Raises:
        ConversionError: A ValueError. A pattern is not a regular expression or matches no
            convolution, or an argument of ODConv is unknown (the message has near names) or out
            of its range. The model is unchanged.
    """
    types = _layer_types(layer)
    _require_known(odconv_args, next(iter(types.values())))
    try:
        check_integer('min_channels', min_channels, least=0)
    except ArgumentError as error:
        raise ConversionError(str(error)) from error
    if kernel_num is not None:
        odconv_args['kernel_num'] = kernel_num
    convolutions = find_convolutions(model)
    names = [site.name for sites in convolutions.values() for site in sites]
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    included = Selection('include', include, names, modules)
    excluded = Selection('exclude', exclude, names, modules)
    elsewhere = _used_elsewhere(model, convolutions)
    frozen = _frozen_names(model, convolutions)

    before = _count_parameters(model)
    layers: dict[nn.Module, nn.Module] = {}
    converted, kept = [], []
    for conv, sites in convolutions.items():
        reason = _reason_to_keep(sites, included, excluded, min_channels, elsewhere.get(conv))
        if reason is None and _within_part(sites[0].name) in frozen:
            reason = 'frozen'
        if reason is None and REPLACEABLE[type(conv)] not in types:
            reason = f'{layer} has no such number of dimensions'
        if reason is None:
            new_type = types[REPLACEABLE[type(conv)]]
            try:
                layers[conv] = _layer_like(conv, new_type, **odconv_args)
            except (TypeError, ValueError) as error:
                raise ConversionError(str(error)) from error
            converted.append(sites[0].name)
        else:
            kept.append((sites[0].name, reason))

    replace_modules(model, layers)
    patch_init_weights(model)
    _warn_of_shared_norms(layers, convolutions)
    patch_fuse_methods(model)
    return ConversionReport(converted, kept, before, _count_parameters(model))


def _require_known(odconv_args: dict[str, Any], layer_type: type) -> None:
    """Raise ConversionError for what is no argument of the layer's own."""
    conversion = inspect.signature(convert_to_odconv).parameters
    plain = inspect.signature(nn.Conv2d).parameters
    own = inspect.signature(layer_type).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
        return  # the layer itself knows
    known = sorted({*own, *conversion} - {'model', 'odconv_args', *plain})
    for name in odconv_args.keys() - (own.keys() - plain.keys()):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f'; is it {near[0]!r}?' if near else f'; known are {", ".join(known)}'
        raise ConversionError(f'there is no argument {name!r}{hint}')


def _reason_to_keep(
    sites: list[Site],
    included: Selection,
    excluded: Selection,
    min_channels: int,
    elsewhere: str | None,
) -> str | None:
    """Why the convolution at these places stays; None if it is to be replaced."""
    if any(excluded.matches(site.name) for site in sites):
        return 'excluded'
    for site in sites:
        reason = blocking_reason(site, elsewhere)
        if reason is not None:
            return reason
        exclusion = default_exclusion(site)
        if exclusion is not None and not included.asks_for(site.name, exclusion):
            return exclusion.reason
    if not any(included.matches(site.name) for site in sites):
        return 'not included'
    conv = sites[0].conv
    if min(conv.in_channels, conv.out_channels) < min_channels:
        return f'fewer than {min_channels} channels'
    return None


def _layer_types(layer: str | type) -> dict[int, Any]:
    """The types of the new layers, by their numbers of dimensions."""
    if layer == 'ODConv':
        return {1: ODConv1d, 2: ODConv2d, 3: ODConv3d}
    found = MODELS.get(layer) if isinstance(layer, str) else layer
    if not (isinstance(found, type) and issubclass(found, DynamicConvNd)):
        known = {name for name, kind in MODELS.module_dict.items() if _is_dynamic(kind)}
        raise ConversionError(
            f'layer must be a dynamic convolution, such as {sorted(known)}, got {layer!r}'
        )
    return {found.ndim: found}


def _is_dynamic(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, DynamicConvNd)


def _layer_like(conv: Any, new_type: Any, **odconv_args: Any) -> nn.Module:
    """A layer of the new type that can stand in the place of ``conv``."""
    layer = new_type.like(conv, **odconv_args)
    layer.load_state_dict(conv.state_dict(), strict=False)  # a weight of the same function
    _require_same_function(layer, conv)
    layer.requires_grad_(conv.weight.requires_grad)
    if conv.bias is not None:
        layer.bias.requires_grad_(conv.bias.requires_grad)
    layer.train(conv.training)
    for name in _HOOKS:
        # The very same dicts, so that the handles that registering gave still remove the hooks.
        setattr(layer, name, getattr(conv, name))
    return layer


@torch.no_grad()
def _require_same_function(layer: Any, conv: Any) -> None:
    """Raise ConversionError unless the new layer computes what ``conv`` does."""
    if conv.weight.is_meta or type(conv.weight) is not nn.Parameter:  # without values
        return
    padding = (0,) * layer.ndim if isinstance(conv.padding, str) else conv.padding
    sizes = [
        max(d * (k - 1), p) + 1
        for d, k, p in zip(conv.dilation, conv.kernel_size, padding, strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((1, conv.in_channels, *sizes), generator=generator).to(conv.weight)
    # Not by calls, which would run hooks.
    expected, found = conv.forward(x).double(), layer.eval().forward(x).double()
    difference = ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    if difference > (1e-3 if torch.finfo(x.dtype).bits > 16 else 0.1):
        raise ConversionError(
            f'with the weights of a {type(conv).__name__}, a {type(layer).__name__} gives '
            f'something else, {difference:.1%} off: its from_static does not fit its attentions'
        )


def replace_modules(model: nn.Module, layers: dict[nn.Module, nn.Module]) -> None:
    """Put the new layers into every place of the old ones."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in layers:
                parent._modules[name] = layers[child]


def _warn_of_shared_norms(
    layers: dict[nn.Module, Any], convolutions: dict[nn.Module, list[Site]]
) -> None:
    """Say so if the statistics of an attention's norm would mix pyramid levels."""
    names = [
        convolutions[conv][0].name
        for conv, layer in layers.items()
        if any(isinstance(m, _BatchNorm | CalibratedNorm) for m in layer.modules())
        and any(serves_several_levels(site) for site in convolutions[conv])
    ]
    if names:
        warnings.warn(
            f'{len(names)} converted convolutions ({names[0]} and so on) are in a head that is '
            'applied to every level of the pyramid. The norms of their attentions mix the '
            "levels' statistics; pass norm_cfg=dict(type='LN')",
            stacklevel=3,
        )


def _frozen_names(model: nn.Module, convolutions: dict[nn.Module, list[Site]]) -> set[str]:
    """The names of frozen convolutions within those children of the model that do train."""
    training = {
        name for name, p in model.named_children() if any(q.requires_grad for q in p.parameters())
    }
    return {
        _within_part(site.name)
        for conv, sites in convolutions.items()
        for site in sites
        if site.parts[0] in training
        and not any(parameter.requires_grad for parameter in conv.parameters())
    }


def _within_part(name: str) -> str:
    """A name without its first part."""
    return name.partition('.')[2]


def _used_elsewhere(
    model: nn.Module, convolutions: dict[nn.Module, list[Site]]
) -> dict[nn.Module, str]:
    """The convolutions that the model uses past their places, each with the reason to keep it."""
    owners = Counter(
        id(parameter) for module in model.modules() for parameter in module._parameters.values()
    )
    reasons = dict.fromkeys(
        held_outside_the_tree(model, convolutions), 'also in a list, dict or function of the model'
    )
    for conv in convolutions:
        weight = getattr(conv, 'weight', None)
        if weight is not None and owners[id(weight)] > 1:
            reasons[conv] = 'weight shared with another module'
    return reasons


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _table(rows: list[list[str]]) -> str:
    table = AsciiTable(rows)
    table.inner_row_border = any('\n' in cell for row in rows for cell in row)
    return table.table


def _shortened(names: Iterable[str]) -> str:
    """The names, one a line, those that differ in numbers only on one line with their count."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r'\d+(?=\.|$)', '*', name), []).append(name)
    lines = [
        members[0] if len(members) == 1 else f'{pattern} ({len(members)})'
        for pattern, members in groups.items()
    ]
    return '\n'.join(lines)
