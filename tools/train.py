#!/usr/bin/env python
"""Train a detector; the command line is that of mmdet's tools/train.py."""

import argparse

from mmdet.utils import setup_cache_size_limit_of_dynamo

from mmdet_odconv import cli


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train a detector')
    parser.add_argument('config', help='train config file')
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate with the batch size'
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='go on from this checkpoint, or without a value from the latest in the work folder',
    )
    cli.add_runner_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    setup_cache_size_limit_of_dynamo()
    config = cli.runner_config(args)
    cli.require_datasets(config, ('train_dataloader', 'val_dataloader'))

    if args.amp:
        config.optim_wrapper.type = 'AmpOptimWrapper'
        config.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in config.get('auto_scale_lr', {}):
            raise SystemExit(
                f'--auto-scale-lr needs auto_scale_lr.base_batch_size, which {args.config} lacks'
            )
        config.auto_scale_lr.enable = True
    if args.resume == 'auto':
        config.resume, config.load_from = True, None
    elif args.resume is not None:
        cli.require_file(args.resume, 'checkpoint')
        config.resume, config.load_from = True, args.resume
    elif config.get('load_from'):
        cli.require_file(config.load_from, 'checkpoint')

    cli.build_runner(config).train()


if __name__ == '__main__':
    main()
