#!/usr/bin/env python
"""Train a detector; the command line is that of mmdet's tools/train.py."""

import argparse
import platform
from pathlib import Path
from typing import Any

import torch
from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config
from mmengine.dist import all_gather_object
from mmengine.runner import Runner, find_latest_checkpoint

from mmdet_odconv import cli
from mmdet_odconv.layers import ODAttention
from mmdet_odconv.safe_running import (
    Checkpoint,
    CheckpointError,
    CheckpointFileError,
    NonFiniteError,
    latest_checkpoint,
    require_datasets,
    require_weights,
    unwrapped,
)
from mmdet_odconv.training import ODConvAttentionHook


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


def add_guards(config: Config) -> None:
    """Add the hooks of docs/reliability.md that the config does not name itself.

    A config with a checkpoint hook of its own kind, or without any, keeps that.
    """
    if 'runner_type' in config:  # a runner that saves in its own way
        return
    hooks = dict(config.get('default_hooks') or {})
    checkpoint = hooks.setdefault('checkpoint', dict(type='CheckpointHook', interval=1))
    if checkpoint and _name(checkpoint) == 'CheckpointHook':
        hooks['checkpoint'] = checkpoint = dict(checkpoint, type='SafeCheckpointHook')
    config.default_hooks = hooks
    guards = ['NonFiniteHook']
    if checkpoint and _name(checkpoint) == 'SafeCheckpointHook':
        guards.append('PreemptionHook')
    custom = config.get('custom_hooks') or []
    if not isinstance(custom, (list, tuple)):
        raise SystemExit(f'custom_hooks must be a list of hooks, got {custom}')
    present = {_name(hook) for hook in custom}
    config.custom_hooks = [*custom] + [dict(type=name) for name in guards if name not in present]


def _name(hook: dict[str, Any]) -> str:
    """The name of a hook's class, which a config has as the class itself or with a scope too."""
    if not isinstance(hook, dict) or 'type' not in hook:
        raise SystemExit(f'a hook must be a dict with a type, got {hook}')
    kind = hook['type']
    return kind.rpartition('.')[2] if isinstance(kind, str) else kind.__name__


def resume(config: Config, path: str) -> Checkpoint | None:
    """Let the training go on from a checkpoint.

    Args:
        config (Config): The config, which is changed.
        path (str): The checkpoint, or 'auto' for the latest in the work folder.

    Returns:
        Checkpoint, optional: None if there is none. The training then starts as the config says.
    """
    if path == 'auto':
        checkpoint = latest_checkpoint(config.work_dir)
    else:
        checkpoint = cli.require_checkpoint(path)
    if checkpoint is None:
        return None
    if not {'epoch', 'iter'} <= set(checkpoint.meta):
        raise SystemExit(
            f'{checkpoint.path} has weights but not the state of a training, so that nothing can '
            'be resumed from it; to start from these weights, set --cfg-options load_from'
        )
    config.resume, config.load_from = True, checkpoint.path
    # MMEngine sets a seed that it drew itself only after the order of the images was drawn.
    randomness = config.get('randomness') or {}
    if randomness.get('seed') is None:
        config.randomness = dict(randomness, seed=checkpoint.meta.get('seed'))
    return checkpoint


def resume_own(config: Config, path: str) -> None:
    """The same for a runner of another kind, which saves in its own way, say in folders."""
    config.resume, config.load_from = True, None if path == 'auto' else path
    latest = find_latest_checkpoint(config.work_dir) if path == 'auto' else path
    if latest is not None and not Path(latest).is_dir():
        cli.require_checkpoint(latest)


def require_same_start(checkpoint: Checkpoint | None) -> None:
    """End the program unless all processes go on from the same checkpoint, or all start anew.

    Args:
        checkpoint (Checkpoint, optional): What this process goes on from, None if it starts anew.

    Raises:
        SystemExit: In all processes; the message has the hosts and checkpoints of two that differ.
    """
    where, meta = f'anew on {platform.node()}', {}
    if checkpoint is not None:
        meta = checkpoint.meta
        where = f'from {checkpoint.path} (iteration {meta.get("iter")}) on {platform.node()}'
    starts = all_gather_object((meta.get('iter'), meta.get('time'), where))
    for *start, other in starts:
        if start != list(starts[0][:2]):
            raise SystemExit(
                f'the processes would not go on from the same place, but {starts[0][2]} and '
                f'{other}: --work-dir must be a folder that all hosts share, or each host needs a '
                'copy of the same checkpoint'
            )


def watch_attentions(runner: Runner) -> None:
    """Let a hook warn of dynamic layers that do not move, unless the config has one itself."""
    if any(isinstance(module, ODAttention) for module in runner.model.modules()) and not any(
        isinstance(hook, ODConvAttentionHook) for hook in runner.hooks
    ):
        runner.register_hook(ODConvAttentionHook())


def warn_of_batch_size(runner: Runner, config: Config) -> None:
    """Say so if the learning rate is meant for a batch of quite another size."""
    scaling = config.get('auto_scale_lr') or {}
    base, each = scaling.get('base_batch_size'), config.train_dataloader.get('batch_size')
    if not base or not isinstance(each, int) or scaling.get('enable'):
        return
    steps = config.optim_wrapper.get('accumulative_counts', 1)
    total = each * runner.world_size * steps
    if not base / 2 <= total <= base * 2:
        runner.logger.warning(
            f'The learning rate of this config is meant for {base} images a step '
            f'(auto_scale_lr.base_batch_size), but a step has {total} here: add --auto-scale-lr '
            'to scale it, or set base_batch_size if the rate is meant as it is.'
        )


def warn_of_rates(runner: Runner, config: Config) -> None:
    """Say so if SGD trains the attentions of ODConv layers at the rate of the weights."""
    wrapper = config.get('optim_wrapper') or {}
    paramwise = wrapper.get('paramwise_cfg') or {}
    keys = ' '.join([*paramwise, *(paramwise.get('custom_keys') or {})])
    if 'attention' in keys or '_fc' in keys or not _is_sgd(wrapper.get('optimizer') or {}):
        return
    if any(isinstance(module, ODAttention) for module in runner.model.modules()):
        runner.logger.warning(
            'Under SGD the attentions of ODConv layers train at the rate of all other weights, '
            'with which the paper anneals their temperature and other detectors find little: set '
            "optim_wrapper.constructor='ODConvOptimWrapperConstructor' and "
            'optim_wrapper.paramwise_cfg.attention_lr_mult=0.1 (docs/recipes.md).'
        )


def warn_of_schedule(runner: Runner, config: Config) -> None:
    """Say so if the schedule of the learning rate ends before the training does, or after it."""
    loop, schedulers = config.get('train_cfg') or {}, config.get('param_scheduler') or []
    schedulers = [schedulers] if isinstance(schedulers, dict) else schedulers
    unit = 'epoch' if 'max_epochs' in loop else 'iter'
    length = loop.get(f'max_{unit}s')
    ends = [
        scheduler['end']
        for scheduler in schedulers
        if scheduler.get('end') and scheduler.get('by_epoch', True) == (unit == 'epoch')
    ]
    if ends and length and max(ends) != length:
        runner.logger.warning(
            f'The learning rate has a schedule of {max(ends)} {unit}s (param_scheduler), and the '
            f'training has {length} (train_cfg.max_{unit}s): set end, and T_max or milestones, of '
            'param_scheduler to fit.'
        )


def _is_sgd(optimizer: dict[str, Any]) -> bool:
    return optimizer.get('type') in ('SGD', torch.optim.SGD)


def checked_runner(config: Config, start: str | None) -> Runner:
    """The runner of a config, once all checkpoints that it will load have been read.

    MMEngine reads them again, so that what is read here does not outlive this function.

    Args:
        config (Config): The config, which is changed.
        start (str, optional): What to go on from, as of :func:`resume`; None to start anew.
    """
    checkpoint, anew = None, start is None
    if start is not None and 'runner_type' in config:
        resume_own(config, start)
    elif start is not None:
        checkpoint = resume(config, start)
        anew = checkpoint is None
    if anew and config.get('load_from'):
        cli.require_checkpoint(config.load_from)
    runner = cli.build_runner(config)
    if anew and start is not None:
        runner.logger.warning(
            f'There is nothing to resume in {config.work_dir}, so the training starts anew.'
        )
    if anew and Path(config.work_dir, 'last_checkpoint').is_file():
        runner.logger.warning(
            f'{config.work_dir} has checkpoints of an earlier run, and this one starts anew among '
            'them: add --resume to go on, or set another --work-dir.'
        )
    warn_of_batch_size(runner, config)
    warn_of_rates(runner, config)
    warn_of_schedule(runner, config)
    watch_attentions(runner)
    if checkpoint is not None:
        require_weights(unwrapped(runner.model), checkpoint)
    if start is not None and 'runner_type' not in config:
        require_same_start(checkpoint)
    cli.require_start_weights(runner.model)
    return runner


def main() -> None:
    args = parse_args()
    setup_cache_size_limit_of_dynamo()
    config = cli.runner_config(args, 'train_dataloader', 'train_cfg', 'optim_wrapper')
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
    start = args.resume
    if start is None and config.get('resume'):
        start = config.get('load_from') or 'auto'
    add_guards(config)

    try:
        runner = checked_runner(config, start)
        with cli.config_errors_as_exit(config):
            runner.train()
    except (CheckpointFileError, CheckpointError, NonFiniteError) as error:
        raise SystemExit(str(error)) from error


if __name__ == '__main__':
    main()
