"""Which BatchNorm directly follows which convolution, found out by following the data."""

import copy
import inspect
from collections import Counter
from collections.abc import Iterator

from torch import fx, nn

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def directly_following(
    model: nn.Module, first: type | tuple[type, ...], second: type | tuple[type, ...]
) -> Iterator[tuple[nn.Module, str, str]]:
    """Pairs of modules of which the second's only input is all that becomes of the first's output.

    Each module's ``forward`` is traced with its children as black boxes, so it is the order of
    execution that counts, not that of registration. A module whose ``forward`` cannot be traced
    contributes no pairs; neither do modules and parameters that stand at several places, modules
    with hooks, and those called more than once.

    Args:
        model (nn.Module): The model.
        first (type or tuple): Types of the first of a pair.
        second (type or tuple): Types of the second.

    Yields:
        tuple: The module whose ``forward`` calls both, and their names in it.
    """
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    places += Counter(id(p) for module in model.modules() for p in module._parameters.values())
    for module in model.modules():
        children = dict(_children(module))
        kinds = [[isinstance(c, kind) for c in children.values()] for kind in (first, second)]
        if isinstance(module, _CONTAINERS) or not all(map(any, kinds)):
            continue
        for a, b in _consecutive_calls(module, children):
            pair = children[a], children[b]
            if (
                isinstance(pair[0], first)
                and isinstance(pair[1], second)
                and not any(_has_hooks(m) or _stands_elsewhere(m, places) for m in pair)
            ):
                yield module, a, b


def _children(module: nn.Module, prefix: str = '') -> Iterator[tuple[str, nn.Module]]:
    """Named children, those in a ``ModuleList`` or ``ModuleDict`` in place of it."""
    for name, child in module._modules.items():
        if isinstance(child, _CONTAINERS):
            yield from _children(child, f'{prefix}{name}.')
        elif child is not None:
            yield f'{prefix}{name}', child


def _consecutive_calls(module: nn.Module, children: dict[str, nn.Module]) -> list[tuple[str, str]]:
    """Names of children of which the second is called on just what the first returned."""
    # A shallow copy, for a forward that stores what it computes in the module.
    module = copy.copy(module)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.default is not parameter.empty
    }
    try:
        graph = _BlackBoxes().trace(module, concrete_args=defaults)
    except Exception:  # whatever a forward may do with a stand-in for a tensor
        return []
    calls = [node for node in graph.nodes if node.op == 'call_module' and node.target in children]
    times = Counter(id(children[node.target]) for node in calls)
    return [
        (before.target, node.target)
        for node in calls
        for before in node.all_input_nodes
        if before in calls
        and len(node.all_input_nodes) == len(before.users) == 1
        and times[id(children[node.target])] == times[id(children[before.target])] == 1
    ]


class _BlackBoxes(fx.Tracer):
    """A tracer that looks into no child."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def to_bool(self, obj: fx.Proxy) -> bool:
        # Blocks with activation checkpointing ask; in inference the answer is no.
        if isinstance(obj, fx.proxy.Attribute) and obj.attr == 'requires_grad':
            return False
        return super().to_bool(obj)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _stands_elsewhere(module: nn.Module, places: Counter[int]) -> bool:
    own = [module, *(p for p in module._parameters.values() if p is not None)]
    return any(places[id(item)] > 1 for item in own)
