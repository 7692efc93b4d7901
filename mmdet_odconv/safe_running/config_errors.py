"""One sentence in place of a traceback, where an error comes from a mistake in the config."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mmengine
from mmengine.config import Config

from .._checks import ArgumentError
from ..compat import files_read_as_tools_do


@contextmanager
def config_errors_as_exit(config: Config) -> Iterator[None]:
    """End the program with one sentence where an error comes from a mistake in the config.

    That is what MMEngine's builders raise about types, arguments and values, and what this package
    raises about its own arguments. All other errors pass. In the block, files are read as the tools
    read them: annotations as UTF-8, and checkpoints in ``torch.load``'s safe mode.

    Args:
        config (Config): The config that is built from.

    Raises:
        SystemExit: A type or an argument does not exist, or a value is refused; the message has
            the name.
    """
    try:
        with files_read_as_tools_do():
            yield
    except ArgumentError as error:
        raise SystemExit(f'{error.key or _owner(error) or config.filename}: {error}') from error
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        message = _of_builder(error, config)
        if message is None:
            raise
        raise SystemExit(f'{config.filename}: {message}') from error


def _owner(error: ArgumentError) -> str | None:
    """The class of this package that refuses an argument of its own."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        owner = type(frame.f_locals.get('self'))
        if owner.__module__.startswith('mmdet_odconv.'):
            return owner.__name__
    return None


def _of_builder(error: Exception, config: Config) -> str | None:
    """What a builder says about a config; None if the error may have another cause."""
    text = str(error.args[0] if error.args else error)
    frames = list(traceback.walk_tb(error.__traceback__))
    if text.startswith('Cannot find None in registry'):  # of mmcv's builders, without the name
        layers = [frame.f_locals.get('layer_type') for frame, _ in frames]
        return f'there is no layer {[*filter(None, layers)][-1]!r}'
    if text == 'None is not a callable object':  # the optimizer, which no registry builds
        return f'there is no optimizer {config.optim_wrapper.optimizer.type!r}'
    codes = [frame.f_code for frame, _ in frames]
    of_library = Path(mmengine.__path__[0]).parent in Path(codes[-1].co_filename).parents
    builds = any(code.co_name in ('build_from_cfg', 'build_dataloader') for code in codes)
    return text if of_library and builds and ' ' in text else None  # more than a bare key
