#!/usr/bin/env python
"""Plot the training losses and the COCO metrics of a run into one PNG."""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

Curve = tuple[list[float], list[float]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('work_dir', type=Path, help='work folder of tools/train.py')
    parser.add_argument('--out', type=Path, default=Path('curves.png'), help='the PNG')
    parser.add_argument(
        '--metrics',
        nargs='+',
        default=['bbox_mAP', 'bbox_mAP_50', 'bbox_mAP_s', 'segm_mAP'],
        help='names of metrics, without the prefix coco/',
    )
    return parser.parse_args()


def latest_log(work_dir: Path) -> Path:
    """The newest scalar log that mmengine's LocalVisBackend left under ``work_dir``."""
    # The folders are named by their time; those of tests have no scalars or none of training.
    logs = sorted(work_dir.glob('*/vis_data/scalars.json'))
    logs = [log for log in logs if '"loss"' in log.read_text(encoding='utf-8')]
    if not logs:
        raise SystemExit(f'no training log in {work_dir.absolute()}/*/vis_data/scalars.json')
    return logs[-1]


def read_curves(log: Path, metrics: list[str]) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """The losses over iterations and the metrics over the validations' steps."""
    losses: dict[str, Curve] = {}
    scores: dict[str, Curve] = {}
    for line in log.read_text(encoding='utf-8').splitlines():
        record = json.loads(line)
        for key, value in record.items():
            name = key.removeprefix('coco/')
            if 'loss' in key:
                curves = losses
            elif name in metrics:
                curves = scores
            else:
                continue
            steps, values = curves.setdefault(name, ([], []))
            steps.append(record['step'])
            values.append(value)
    return losses, scores


def main() -> None:
    args = parse_args()
    log = latest_log(args.work_dir)
    losses, scores = read_curves(log, args.metrics)
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout='constrained')
    for name, (steps, values) in losses.items():
        left.plot(steps, values, label=name)
    left.set(title='Training', xlabel='iteration', ylabel='loss')
    left.set_ylim(bottom=0)
    for name, (steps, values) in scores.items():
        right.plot(steps, values, marker='o', label=name)
    right.set(title='Validation', xlabel='epoch (iteration in runs by iteration)', ylabel='AP')
    right.set_ylim(0, 1)
    for axes, curves in ((left, losses), (right, scores)):
        axes.grid(alpha=0.3)
        if curves:
            axes.legend()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out, dpi=120)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
