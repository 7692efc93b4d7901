#!/usr/bin/env python
"""Count parameters and multiply-adds of a detector, beside its twin with plain convolutions.

A multiplication with its addition is one, as in the papers; docs/performance.md says what is
counted. The proposals of two-stage detectors depend on the image: theirs are those of an empty one.
"""

import argparse

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.model import revert_sync_batchnorm
from terminaltables import AsciiTable
from torch import nn

from mmdet_odconv import cli
from mmdet_odconv.analysis import Complexity, count_complexity, plain_twin


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--shape',
        type=cli.positive,
        nargs=2,
        metavar=('H', 'W'),
        default=(800, 1280),
        help='height and width of the image, after resizing and padding (default: 800 1280)',
    )
    parser.add_argument(
        '--depth',
        type=cli.positive,
        default=1,
        help='levels of modules to list (default: %(default)s)',
    )
    parser.add_argument('--backbone', action='store_true', help='the backbone alone')
    cli.add_config_options(parser)
    return parser.parse_args()


def costs_of(model: nn.Module, shape: tuple[int, int]) -> dict[str, Complexity]:
    """What a detector, or a backbone, costs for an empty image."""
    image, others = torch.zeros(1, 3, *shape), {}
    if hasattr(model, 'data_preprocessor'):
        metainfo = dict(img_shape=shape, ori_shape=shape, batch_input_shape=shape)
        others['data_samples'] = [DetDataSample(metainfo=metainfo)]
    return count_complexity(model, image, **others)


def table(model: nn.Module, shape: tuple[int, int], depth: int) -> str:
    """The costs of the modules down to a depth, and of the same with plain convolutions."""
    found, plain = costs_of(model, shape), costs_of(plain_twin(model), shape)
    head = ['', 'parameters', 'multiply-adds', 'mixing banks', 'attentions']
    rows = [[*head, 'plain: parameters', 'plain: multiply-adds']]
    for name, costs in found.items():
        if name and (name.count('.') < depth) and (costs.parameters or costs.multiply_adds):
            rows.append(row(name, costs, plain[name]))
    rows.append(row('total', found[''], plain['']))
    result = AsciiTable(rows)
    result.inner_footing_row_border = True
    result.justify_columns = dict.fromkeys(range(1, 7), 'right')
    return result.table


def row(name: str, costs: Complexity, plain: Complexity) -> list[str]:
    numbers = (costs.parameters, costs.multiply_adds, costs.mixture, costs.attention)
    numbers += (plain.parameters, plain.multiply_adds)
    return [name, *(f'{number / 1e6:,.2f} M' for number in numbers)]


def main() -> None:
    args = parse_args()
    config = cli.load_config(args.config, args.cfg_options)
    register_all_modules()
    cli.shorten_report(config)
    with cli.config_errors_as_exit(config):
        model = revert_sync_batchnorm(MODELS.build(config.model)).eval()
    if args.backbone and not hasattr(model, 'backbone'):
        raise SystemExit(f'{args.config}: {type(model).__name__} has no backbone of its own')
    part = model.backbone if args.backbone else model
    print(f'one image of {args.shape[0]}×{args.shape[1]}')
    try:
        print(table(part, tuple(args.shape), args.depth))
    except RuntimeError as error:  # of PyTorch, say for an image that is too small
        raise SystemExit(f'{args.config} cannot be run on such an image: {error}') from error


if __name__ == '__main__':
    main()
