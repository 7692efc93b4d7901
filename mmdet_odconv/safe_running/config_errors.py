"""What a user is told of a mistake in a config, in place of a traceback."""

import difflib
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mmengine
from mmengine import registry
from mmengine.config import Config
from mmengine.registry import Registry
from torch import nn

from .._checks import ArgumentError
from ..compat import files_read_as_tools_do


@contextmanager
def config_errors_as_exit(config: Config) -> Iterator[None]:
    """End the program with one sentence where an error comes from a mistake in the config.

    The sentence takes the place of what MMEngine's builders raise about types, arguments and
    values, and of what the parts of a model raise that do not fit each other. All other errors
    pass. In the block, files are read as the tools read them: annotations as UTF-8, and
    checkpoints in ``torch.load``'s safe mode.

    Args:
        config (Config): The config that is built from.

    Raises:
        SystemExit: A type or an argument does not exist, a value is refused, or a part of the
            model gets channels or maps that it was not built for. The message has the name, and
            near ones.
    """
    try:
        with files_read_as_tools_do():
            yield
    except ArgumentError as error:
        raise SystemExit(f'{error.key or _owner(error) or config.filename}: {error}') from error
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        message = _mistake(error, config) or _misfit(error)
        if message is None:
            raise
        raise SystemExit(f'{config.filename}: {message}') from error


def _owner(error: ArgumentError) -> str | None:
    """Whose argument is refused: the layers', or that of a hook or another part by its class."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        owner = frame.f_locals.get('self')
        if isinstance(owner, nn.Module):
            return 'the ODConv layers of the config'
        if type(owner).__module__.startswith('mmdet_odconv.'):
            return type(owner).__name__
    return None


def _mistake(error: Exception, config: Config) -> str | None:
    """What a builder says about a config; None if the error may have another cause."""
    text = str(error.args[0] if error.args else error)
    unknown = re.match(r'(\S+) is not in the (?:\S+::)?([\w ]+) registry', text)
    if unknown:
        near = _is_it(unknown[1], _registered(unknown[2]))
        return f'there is no {unknown[2]} {unknown[1]!r}{near}'
    if text.startswith('Cannot find None in registry'):  # of mmcv's builders, without the name
        for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
            if isinstance(name := frame.f_locals.get('layer_type'), str):
                return f'there is no layer {name!r}{_is_it(name, _registered("model"))}'
    if text == 'None is not a callable object':  # the optimizer, which no registry builds
        name = config.optim_wrapper.optimizer.type
        return f'there is no optimizer {name!r}{_is_it(name, _registered("optimizer"))}'
    if isinstance(error, TypeError):
        # Of PyTorch, which says neither the name nor the value of what is no number.
        for key, value in entries(config._cfg_dict):
            if isinstance(value, str) and re.search(r'(^|\.)optimizer\.(?!type$)\w+$', key):
                return f'{key} must be a number, got {value!r}'
    argument = re.search(
        r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'", text
    )
    keys = {key.rpartition('.')[2] for key, _ in entries(config._cfg_dict)}
    if argument and argument[2] in keys:
        near = _is_it(argument[2], sorted(keys - {argument[2]}))
        return f'{argument[1]} has no argument {argument[2]!r}{near}'
    frames = traceback.extract_tb(error.__traceback__)
    of_library = Path(mmengine.__path__[0]).parent in Path(frames[-1].filename).parents
    if of_library and any(frame.name in ('build_from_cfg', 'build_dataloader') for frame in frames):
        return f'{text[:1].lower()}{text[1:]}' if isinstance(error, AssertionError) else text
    return None


def _misfit(error: Exception) -> str | None:
    """What a part of a model says about its input; None if the error has another cause."""
    text = str(error.args[0] if error.args else '')
    channels = re.search(r'to have (\d+) channels, but got (\d+)', text) or re.search(
        r'expects (\d+) input channels, got (\d+)', text
    )
    frames = list(traceback.walk_tb(error.__traceback__))
    parts = [frame.f_locals.get('self') for frame, _ in frames]
    modules = [part for part in parts if isinstance(part, nn.Module) and '_modules' in vars(part)]
    if not modules:
        return None
    names = {id(module): name for name, module in modules[0].named_modules()}
    name = f'model.{names.get(id(modules[-1]), "")}'.replace('model.module.', 'model.').rstrip('.')
    if channels:
        return (
            f'{name} takes {channels[1]} channels, but its input has {channels[2]}; check the '
            f'in_channels of {".".join(name.split(".")[:2])}'
        )
    if isinstance(error, AssertionError) and not text:
        line = traceback.extract_tb(error.__traceback__)[-1].line
        return f'{type(modules[-1]).__name__} refuses what it is given: {line}'
    return None


def _registered(kind: str) -> list[str]:
    """The names in the registries of a kind, 'model' say, MMEngine's and those below it."""
    found, left = set(), [v for v in vars(registry).values() if isinstance(v, Registry)]
    for each in left:
        left += each.children.values()
        if each.name == kind:
            found |= set(each.module_dict)
    return sorted(found)


def _is_it(name: str, names: Sequence[str]) -> str:
    spelt = {each.lower(): each for each in names}
    near = [spelt[each] for each in difflib.get_close_matches(name.lower(), spelt, n=2)]
    return f'; is it {" or ".join(near)}?' if near else ''


def entries(node: Any, start: str = '') -> Iterator[tuple[str, Any]]:
    """All entries of a config with their dotted keys."""
    if isinstance(node, (list, tuple)):
        node = dict(enumerate(node))
    for key, value in node.items() if isinstance(node, dict) else ():
        yield f'{start}{key}', value
        yield from entries(value, f'{start}{key}.')
