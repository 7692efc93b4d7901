#!/usr/bin/env python
"""Train the arms of the study that have no log yet; a run that was stopped goes on.

Every run has one thread, and two go side by side. Of each, a small log of scalars stays in the
task's folder in docs/study/logs; table.py makes the tables and figures from them.

Example: python tools/study/run.py plain od_k4 --seeds 0 1 2
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from arms import (
    ARMS,
    BATCH2_ARMS,
    DEEPPCB_ARMS,
    FINE_TUNE_ARMS,
    FINE_TUNE_BATCH2_ARMS,
    FINE_TUNE_BATCH8_ARMS,
    FINE_TUNE_DEEPPCB_ARMS,
    FINE_TUNE_LIGHT_ARMS,
    FINE_TUNE_MOBILE_ARMS,
    LIGHT_ARMS,
    LIGHT_PRETRAINED_ARMS,
    LITE0_ARMS,
    MOBILE_ARMS,
    NARROW_ARMS,
    NARROW_PRETRAINED_ARMS,
    PRETRAINED_ARMS,
    Options,
    split_rate,
)
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner

from mmdet_odconv.analysis import AttentionMeter, count_complexity, static_attentions
from mmdet_odconv.layers import DynamicConvNd

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / 'tools/study'
TASKS: dict[str, tuple[Path, dict[str, Options]]] = {
    'hituav_lite0': (STUDY / 'hituav_lite0.py', LITE0_ARMS),
    'deeppcb_lite0': (STUDY / 'deeppcb_lite0.py', LITE0_ARMS),
    'hituav_wake': (STUDY / 'hituav_wake.py', LITE0_ARMS),
    'shapes': (STUDY / 'shapes.py', ARMS),
    'light': (STUDY / 'shapes.py', LIGHT_ARMS),
    'narrow': (STUDY / 'shapes.py', NARROW_ARMS),
    'mobile': (STUDY / 'shapes.py', MOBILE_ARMS),
    'fine_tune': (STUDY / 'fine_tune.py', FINE_TUNE_ARMS),
    'fine_tune_light': (STUDY / 'fine_tune.py', FINE_TUNE_LIGHT_ARMS),
    'fine_tune_mobile': (STUDY / 'fine_tune.py', FINE_TUNE_MOBILE_ARMS),
    'fine_tune_batch2': (STUDY / 'fine_tune_batch2.py', FINE_TUNE_BATCH2_ARMS),
    'fine_tune_batch8': (STUDY / 'fine_tune_batch8.py', FINE_TUNE_BATCH8_ARMS),
    'fine_tune_deeppcb': (STUDY / 'fine_tune_deeppcb.py', FINE_TUNE_DEEPPCB_ARMS),
    'batch2': (STUDY / 'batch2.py', BATCH2_ARMS),
    'deeppcb': (STUDY / 'deeppcb.py', DEEPPCB_ARMS),
    'pretrained': (STUDY / 'pretrained.py', PRETRAINED_ARMS),
    'light_pretrained': (STUDY / 'pretrained.py', LIGHT_PRETRAINED_ARMS),
    'narrow_pretrained': (STUDY / 'pretrained.py', NARROW_PRETRAINED_ARMS),
}
# Those with ImageNet weights and real images, whose logs also say how dynamic the layers are.
REAL_TASKS = ('hituav_lite0', 'deeppcb_lite0', 'hituav_wake')
LOGS = ROOT / 'docs/study/logs'
METRICS = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')


def arm_config(
    arm: str, seed: int, options: dict[str, Any] | None = None, task: str = 'narrow'
) -> Config:
    """The config of a run.

    Args:
        arm (str): One of those of the task, ``plain_rate4`` for ``plain`` at four times the task's
            learning rate.
        seed (int): Seed of the weights' start and of the order of the data.
        options (dict, optional): Further changes, as of ``--cfg-options``. Default: None.
        task (str): One of ``TASKS``. Default: 'narrow'.
    """
    path, arms = TASKS[task]
    name, factor = split_rate(arm)
    config = Config.fromfile(path)
    config.merge_from_dict({**arms[name], 'randomness': dict(seed=seed), **(options or {})})
    config.optim_wrapper.optimizer.lr *= factor
    return config


def train(config: Config, work_dir: Path) -> Runner:
    """Train, or go on from where an earlier run in ``work_dir`` was stopped.

    Returns:
        Runner: With the trained model.
    """
    config.work_dir = str(work_dir)
    loop = config.train_cfg
    first = loop.get('val_begin', 1) if config.val_dataloader is not None else math.inf
    checkpoint = last_checkpoint(work_dir, first, loop.get('val_interval', 1))
    if checkpoint:
        config.resume, config.load_from = True, str(checkpoint)
    torch.set_num_threads(1)
    runner = Runner.from_cfg(config)
    runner.model.to(memory_format=memory_format(config))
    runner.train()
    return runner


def memory_format(config: Config) -> torch.memory_format:
    """With depthwise convolutions, as in EfficientNet-Lite, a CPU is faster with channels last."""
    depthwise = config.model.backbone.type == 'EfficientNetLite'
    return torch.channels_last if depthwise else torch.contiguous_format


@torch.no_grad()
def evaluate(runner: Runner) -> dict[str, float]:
    """The metrics on the validation images; unlike the loop's, they do not go to the logs."""
    runner.model.eval()
    for batch in runner.val_dataloader:
        samples = runner.model.val_step(batch)
        runner.val_evaluator.process(data_samples=samples, data_batch=batch)
    return runner.val_evaluator.evaluate(len(runner.val_dataloader.dataset))


def dynamics(runner: Runner) -> dict[str, Any]:
    """How much the attentions depend on the image, and what that is worth.

    Returns:
        dict: 'attention_std', the median over the layers of each attention's standard deviation
        over the validation images; 'dynamic_layers', the share of the layers in which one attention
        has at least 0.02; 'mAP_static', AP with all attentions at their means. Empty for a model
        without dynamic layers.
    """
    if not any(isinstance(m, DynamicConvNd) for m in runner.model.modules()):
        return {}
    with AttentionMeter(runner.model) as meter:
        evaluate(runner)
    statistics = meter.statistics()
    with static_attentions(runner.model, meter.means()):
        metrics = evaluate(runner)
    names = dict.fromkeys(name for s in statistics for name in s.std)
    return {
        'attention_std': {
            name: round(median(s.std[name] for s in statistics if name in s.std), 5)
            for name in names
        },
        'dynamic_layers': sum(s.largest_std >= 0.02 for s in statistics) / len(statistics),
        'mAP_static': metrics['coco/bbox_mAP'],
    }


def last_checkpoint(work_dir: Path, val_begin: float = 1, val_interval: int = 1) -> Path | None:
    """The newest checkpoint in ``work_dir``, None if there is no such one.

    One whose evaluation is not in the logs does not count if it is to be evaluated: the run was
    stopped while it wrote or evaluated it, and going on from there would leave the evaluation out.

    Args:
        work_dir (Path): Folder of a run.
        val_begin (float): The first epoch that is evaluated. Default: 1.
        val_interval (int): How many epochs lie between two evaluations. Default: 1.
    """
    found = {int(path.stem.removeprefix('epoch_')): path for path in work_dir.glob('epoch_*.pth')}
    done = {entry['epoch'] for entry in scalars(work_dir)['evaluations']}
    whole = [e for e in found if e in done or e < val_begin or e % val_interval]
    return found[max(whole)] if whole else None


def scalars(work_dir: Path) -> dict[str, list[dict[str, float]]]:
    """What MMEngine's logs of a run say: training losses, and metrics of the evaluations.

    A run that was stopped and went on has several logs. Of an iteration that is in two of them the
    later one holds.
    """
    training: dict[int, dict[str, float]] = {}
    evaluations: dict[int, dict[str, float]] = {}
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in path.read_text(encoding='utf-8').splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the last line of a run that was killed
                continue
            if 'loss' in entry:
                training[entry['step']] = {
                    'iteration': entry['step'],
                    'loss': round(entry['loss'], 5),
                    'seconds': round(entry['time'], 4),
                }
            else:  # without metrics if nothing at all was found
                evaluations[entry['step']] = {
                    'epoch': entry['step'],
                    **{name: entry.get(f'coco/bbox_{name}', 0.0) for name in METRICS},
                }
    return {
        'training': [training[step] for step in sorted(training)],
        'evaluations': [evaluations[step] for step in sorted(evaluations)],
    }


def count(config: Config) -> dict[str, int]:
    """Parameters of the detector, and multiply-adds of its convolutions for one image.

    Those of a dynamic convolution include the mixture of its bank, which is made for each image.
    """
    image = torch.zeros(1, 3, *config.scale)
    whole = count_complexity(MODELS.build(config.model), image, mode='tensor')['']
    return {
        'parameters': whole.parameters,
        'multiply_adds': whole.convolution + whole.mixture,
    }


def relative_times(config: Config, other: Config, steps: int = 20) -> dict[str, float]:
    """Processor time of a training step and of a test image, relative to those of another config.

    The two alternate, so that whatever else runs on the machine slows both alike.

    Returns:
        dict[str, float]: 'step_time' for a batch, and 'image_time' for the network without the
        decoding of its boxes.
    """
    configs = (config, other)
    models = [
        MODELS.build(each.model).to(memory_format=memory_format(each)).train() for each in configs
    ]
    wrappers = [
        build_optim_wrapper(model, each.optim_wrapper)
        for model, each in zip(models, configs, strict=True)
    ]
    batch = next(iter(Runner.build_dataloader(config.train_dataloader, seed=0)))
    training = [
        partial(model.train_step, batch, wrapper)
        for model, wrapper in zip(models, wrappers, strict=True)
    ]
    image = torch.zeros(1, 3, *reversed(config.scale))
    testing = [partial(model, image, mode='tensor') for model in models]
    ratios = {'step_time': _ratio(training, steps)}
    for model in models:
        model.eval()
    with torch.no_grad():
        return {**ratios, 'image_time': _ratio(testing, steps)}


def _ratio(calls: list[Callable[[], Any]], rounds: int) -> float:
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, times in zip(calls, seconds, strict=True):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
    ours, theirs = map(median, seconds)
    return round(ours / theirs, 3)


def costs(config: Config, plain: Config) -> dict[str, float]:
    """Parameters, multiply-adds, and the times relative to the plain network's."""
    torch.set_num_threads(1)
    is_plain = config.model == plain.model
    times = dict(step_time=1.0, image_time=1.0) if is_plain else relative_times(config, plain)
    return {**count(config), **times}


def log_of(arm: str, seed: int, logs: Path) -> Path:
    return logs / f'{arm}-{seed}.json'


def run(
    arm: str, seed: int, work_dirs: Path, logs: Path, options: dict[str, Any], task: str
) -> None:
    """Train one arm with one seed, and write its log."""
    register_all_modules()
    config = arm_config(arm, seed, options, task)
    work_dir = work_dirs / f'{arm}-{seed}'
    runner = train(config, work_dir)
    plain = arm_config('plain', seed, options, task)
    log = {'arm': arm, 'seed': seed, **costs(config, plain), **scalars(work_dir)}
    if task in REAL_TASKS:
        log |= dynamics(runner)
    logs.mkdir(parents=True, exist_ok=True)
    write(log, log_of(arm, seed, logs))


def recount(arm: str, paths: list[Path], options: dict[str, Any], task: str) -> None:
    """Measure what an arm costs again, and put it into its logs, those at other rates too."""
    register_all_modules()
    new = costs(*(arm_config(name, 0, options, task) for name in (arm, 'plain')))
    for path in paths:
        write(json.loads(path.read_text(encoding='utf-8')) | new, path)


def write(log: dict[str, Any], path: Path) -> None:
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(log, indent=1) + '\n', encoding='utf-8')
    temporary.replace(path)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train what the study lacks.')
    parser.add_argument(
        'arms', nargs='*', help=f'all of the task by default, such as {", ".join(ARMS)}'
    )
    parser.add_argument('--task', choices=TASKS, default='narrow', help='(%(default)s)')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--jobs', type=int, default=2, help='runs side by side (%(default)s)')
    parser.add_argument('--work-dirs', type=Path, help='of the runs (work_dirs/study/TASK)')
    parser.add_argument('--logs', type=Path, help='(docs/study/logs/TASK)')
    parser.add_argument(
        '--recount',
        action='store_true',
        help='train nothing, but measure again what the arms with logs cost',
    )
    parser.add_argument(
        '--options', type=json.loads, default={}, help='changes of the base config, as JSON'
    )
    args = parser.parse_args(argv)
    for arm in args.arms:
        if split_rate(arm)[0] not in TASKS[args.task][1]:
            parser.error(f'there is no arm {arm!r}; there are {", ".join(TASKS[args.task][1])}')
    args.work_dirs = args.work_dirs or ROOT / 'work_dirs/study' / args.task
    args.logs = args.logs or LOGS / args.task
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    arms = args.arms or list(TASKS[args.task][1])
    if args.recount:
        paths: dict[str, list[Path]] = {}
        for arm in arms:
            logs = [log_of(arm, seed, args.logs) for seed in args.seeds]
            paths.setdefault(split_rate(arm)[0], []).extend(filter(Path.exists, logs))
        for arm, logs in paths.items():
            if logs:
                recount(arm, logs, args.options, args.task)
        return
    missing = [
        (arm, seed)
        for seed in args.seeds
        for arm in arms
        if not log_of(arm, seed, args.logs).exists()
    ]
    if not missing:
        print(f'nothing to do: these runs have logs in {args.logs}; --logs names another folder')
        return
    if len(missing) == 1:
        run(*missing[0], args.work_dirs, args.logs, args.options, args.task)
        return

    def start(job: tuple[str, int]) -> int:
        arm, seed = job
        print(f'{arm}, seed {seed}', flush=True)
        own = [arm, '--seeds', str(seed), '--work-dirs', str(args.work_dirs)]
        own += ['--logs', str(args.logs), '--options', json.dumps(args.options)]
        own += ['--task', args.task]
        folder = args.work_dirs / f'{arm}-{seed}'
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / 'output.txt').open('a', encoding='utf-8') as output:
            return subprocess.run(
                [sys.executable, __file__, *own],
                env={**os.environ, 'OMP_NUM_THREADS': '1'},
                stdout=output,
                stderr=subprocess.STDOUT,
            ).returncode

    with ThreadPoolExecutor(args.jobs) as pool:
        failed = [job for job, code in zip(missing, pool.map(start, missing), strict=True) if code]
    if failed:
        names = ', '.join(f'{arm}-{seed}' for arm, seed in failed)
        raise SystemExit(f'failed: {names}; see output.txt in their folders in {args.work_dirs}')


if __name__ == '__main__':
    main()
