"""Arguments that the tools have in common."""

import argparse
from typing import Any

from mmengine.config import DictAction


def add_runner_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that mmdet's train.py and test.py have in common."""
    parser.add_argument('--work-dir', help='folder for logs, checkpoints and metrics')
    add_config_options(parser)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


class _Options(DictAction):
    """MMEngine's action, which fails without a word on an option that has no value."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        for value in values:
            if '=' not in value:
                parser.error(f'{option_string} takes key=value, got {value!r}')
        super().__call__(parser, namespace, values, option_string)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options``."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_Options,
        help='overrides of the config, key=value each; a list is key="[a,b]" or key=a,b, and '
        'nests, as in key="[(a,b),(c,d)]": quote it and leave no blanks',
    )


def add_collapse(parser: argparse.ArgumentParser) -> None:
    """Add ``--collapse-static``, which :func:`collapse_static` obeys."""
    parser.add_argument(
        '--collapse-static',
        type=positive,
        nargs='?',
        const=64,
        metavar='N',
        help='replace dynamic layers whose attentions hardly depend on the image, over the first '
        'N images of the test set (default: 64), by plain convolutions',
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    """Add ``--force``, which :func:`require_new_file` obeys."""
    parser.add_argument('--force', action='store_true', help='overwrite an existing output file')


def positive(text: str) -> int:
    """A whole number of at least one, as the type of an argument."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f'must be a whole number of at least 1, got {text}')
    return int(text)
