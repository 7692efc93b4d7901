#!/usr/bin/env python
"""Train a detector; the command line is that of mmdet's tools/train.py."""

import argparse

from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config
from mmengine.runner import Runner

from mmdet_odconv import cli
from mmdet_odconv.dataset_checks import require_datasets


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
        help='go on from this checkpoint, or without a value from the latest in the work folder; '
        'without one there, the training starts anew',
    )
    cli.add_runner_arguments(parser)
    return parser.parse_args()


def resume(config: Config, checkpoint: str) -> bool:
    """Let the training go on from a checkpoint.

    Args:
        config (Config): The config, which is changed.
        checkpoint (str): A path, or 'auto' for the latest in the work folder.

    Returns:
        bool: Whether there is something to go on from. If not, the config is as it was, with what
        it says of ``load_from``: a job that a cluster may stop has ``--resume`` from its first
        start on.
    """
    if checkpoint == 'auto':
        if cli.latest_checkpoint(config.work_dir) is None:
            return False
        config.resume, config.load_from = True, None
        return True
    if 'strategy' not in config:  # some strategies have folders as checkpoints
        cli.require_file(checkpoint, 'checkpoint')
    config.resume, config.load_from = True, checkpoint
    return True


def warn_of_batch_size(runner: Runner, config: Config) -> None:
    """Say so if the learning rate is meant for a batch of quite another size."""
    scaling = config.get('auto_scale_lr') or {}
    base, each = scaling.get('base_batch_size'), config.train_dataloader.get('batch_size')
    if not base or not each or scaling.get('enable'):
        return
    steps = config.optim_wrapper.get('accumulative_counts', 1)
    total = each * runner.world_size * steps
    if not base / 2 <= total <= base * 2:
        runner.logger.warning(
            f'The learning rate of this config is meant for {base} images a step '
            f'(auto_scale_lr.base_batch_size), but a step has {total} here: add --auto-scale-lr '
            'to scale it, or set base_batch_size if the rate is meant as it is.'
        )


def main() -> None:
    args = parse_args()
    setup_cache_size_limit_of_dynamo()
    config = cli.runner_config(args)
    require_datasets(config, ('train_dataloader', 'val_dataloader'))

    if args.amp:
        config.optim_wrapper.type = 'AmpOptimWrapper'
        config.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in config.get('auto_scale_lr', {}):
            raise SystemExit(
                f'--auto-scale-lr needs auto_scale_lr.base_batch_size, which {args.config} lacks'
            )
        config.auto_scale_lr.enable = True
    resumed = args.resume is not None and resume(config, args.resume)
    if not resumed and config.get('load_from'):
        cli.require_file(config.load_from, 'checkpoint')

    runner = cli.build_runner(config)
    if args.resume is not None and not resumed:
        runner.logger.warning(
            f'There is nothing to resume in {config.work_dir}, so the training starts anew.'
        )
    warn_of_batch_size(runner, config)
    cli.require_start_weights(runner.model, None if resumed else config.get('load_from'))
    runner.train()


if __name__ == '__main__':
    main()
