#!/usr/bin/env python
"""Train the arms of the study that have no log yet; a run that was stopped goes on.

Every run has one thread, and two go side by side. Of each, a small log of scalars stays in
docs/study/logs; table.py makes the tables and figures from them.

Example: python tools/study/run.py plain od_k4 --seeds 0 1 2
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from arms import ARMS
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from mmdet_odconv.layers.odconv import _ODConvNd

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / 'tools/study/base.py'
LOGS = ROOT / 'docs/study/logs'
METRICS = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')


def arm_config(arm: str, seed: int, options: dict[str, Any] | None = None) -> Config:
    """The config of a run.

    Args:
        arm (str): One of ``ARMS``.
        seed (int): Seed of the weights' start and of the order of the data.
        options (dict, optional): Further changes, as of ``--cfg-options``. Default: None.
    """
    config = Config.fromfile(BASE)
    config.merge_from_dict({**ARMS[arm], 'randomness': dict(seed=seed), **(options or {})})
    return config


def train(config: Config, work_dir: Path) -> None:
    """Train, or go on from the last checkpoint in ``work_dir``."""
    config.work_dir = str(work_dir)
    config.resume = (work_dir / 'last_checkpoint').exists()
    torch.set_num_threads(1)
    Runner.from_cfg(config).train()


def scalars(work_dir: Path) -> dict[str, list[dict[str, float]]]:
    """What MMEngine's logs of a run say: training losses, and metrics of the evaluations.

    A run that was stopped and went on has several logs. Of an iteration that is in two of them the
    later one holds.
    """
    training: dict[int, dict[str, float]] = {}
    evaluations: dict[int, dict[str, float]] = {}
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in path.read_text(encoding='utf-8').splitlines():
            entry = json.loads(line)
            if 'loss' in entry:
                training[entry['step']] = {
                    'iteration': entry['step'],
                    'loss': round(entry['loss'], 5),
                    'seconds': round(entry['time'], 4),
                }
            elif 'coco/bbox_mAP' in entry:
                evaluations[entry['step']] = {
                    'epoch': entry['step'],
                    **{name: entry[f'coco/bbox_{name}'] for name in METRICS},
                }
    return {
        'training': [training[step] for step in sorted(training)],
        'evaluations': [evaluations[step] for step in sorted(evaluations)],
    }


def count(config: Config) -> dict[str, int]:
    """Parameters of the detector, and multiply-adds of its convolutions for one image.

    Those of a dynamic convolution include the mixture of its bank, which is made for each image.
    """
    model = MODELS.build(config.model).eval()
    madds = 0

    def add(layer: Any, inputs: Any, output: Any) -> None:
        nonlocal madds
        kernels = layer.weight if isinstance(layer, _ODConvNd) else layer.weight[None]
        madds += kernels[0, 0].numel() * output.numel()
        if len(kernels) > 1:
            madds += kernels.numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | _ODConvNd):
            module.register_forward_hook(add)
    height, width = config.scale
    with torch.no_grad():
        model(torch.zeros(1, 3, height, width), mode='tensor')
    return {'parameters': sum(p.numel() for p in model.parameters()), 'multiply_adds': madds}


def log_of(arm: str, seed: int, logs: Path = LOGS) -> Path:
    return logs / f'{arm}-{seed}.json'


def run(arm: str, seed: int, work_dirs: Path, logs: Path, options: dict[str, Any]) -> None:
    """Train one arm with one seed, and write its log."""
    register_all_modules()
    config = arm_config(arm, seed, options)
    work_dir = work_dirs / f'{arm}-{seed}'
    train(config, work_dir)
    found = scalars(work_dir)
    log = {
        'arm': arm,
        'seed': seed,
        **count(config),
        'seconds_per_step': statistics.median(entry['seconds'] for entry in found['training']),
        **found,
    }
    logs.mkdir(parents=True, exist_ok=True)
    path = log_of(arm, seed, logs)
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(log, indent=1) + '\n', encoding='utf-8')
    temporary.replace(path)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train what the study lacks.')
    parser.add_argument('arms', nargs='*', help=f'all by default: {", ".join(ARMS)}')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--jobs', type=int, default=2, help='runs side by side (%(default)s)')
    parser.add_argument('--work-dirs', type=Path, default=ROOT / 'work_dirs/study')
    parser.add_argument('--logs', type=Path, default=LOGS)
    parser.add_argument(
        '--options', type=json.loads, default={}, help='changes of the base config, as JSON'
    )
    args = parser.parse_args(argv)
    for arm in args.arms:
        if arm not in ARMS:
            parser.error(f'there is no arm {arm!r}; there are {", ".join(ARMS)}')
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    arms = args.arms or list(ARMS)
    missing = [
        (arm, seed)
        for seed in args.seeds
        for arm in arms
        if not log_of(arm, seed, args.logs).exists()
    ]
    if len(missing) == 1:
        run(*missing[0], args.work_dirs, args.logs, args.options)
        return

    def start(job: tuple[str, int]) -> int:
        arm, seed = job
        print(f'{arm}, seed {seed}', flush=True)
        own = [arm, '--seeds', str(seed), '--work-dirs', str(args.work_dirs)]
        own += ['--logs', str(args.logs), '--options', json.dumps(args.options)]
        folder = args.work_dirs / f'{arm}-{seed}'
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / 'output.txt').open('a') as output:
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
