#!/usr/bin/env python
"""Plot the training losses and the COCO metrics of a run into one PNG."""

import argparse
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Curve = dict[float, float]  # the values by their steps


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


def logs_of_run(work_dir: Path) -> list[Path]:
    """The scalar logs of the latest run under ``work_dir``, each of its resumptions having one."""
    # The folders are named by their time; those of tests have no scalars or none of training.
    steps = {log: first_step(log) for log in sorted(work_dir.glob('*/vis_data/scalars.json'))}
    logs = [log for log, step in steps.items() if step is not None]
    if not logs:
        raise SystemExit(f'no training log in {work_dir.absolute()}/*/vis_data/scalars.json')
    start = len(logs) - 1
    while start and steps[logs[start - 1]] < steps[logs[start]]:  # it went on from there
        start -= 1
    return logs[start:]


def first_step(log: Path) -> int | None:
    """The first iteration whose loss is in a log."""
    return next((record['step'] for record in records(log) if 'loss' in record), None)


def records(log: Path) -> Iterator[dict[str, float]]:
    """The lines of a log. The last one may be cut off if the run was killed, and is left out."""
    for line in log.read_text(encoding='utf-8').splitlines():
        with suppress(ValueError):
            yield json.loads(line)


def read_curves(logs: list[Path], metrics: list[str]) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """The losses over iterations and the metrics over the validations' steps.

    Of a step that is in several logs the last one holds.
    """
    losses: dict[str, Curve] = {}
    scores: dict[str, Curve] = {}
    for record in (record for log in logs for record in records(log)):
        for key, value in record.items():
            name = key.removeprefix('coco/')
            if 'loss' in key:
                losses.setdefault(name, {})[record['step']] = value
            elif name in metrics:
                scores.setdefault(name, {})[record['step']] = value
    return losses, scores


def draw(axes: Axes, curves: dict[str, Curve], **style: str) -> None:
    """A line for each curve, with a legend below, where it hides none of them."""
    for name, curve in curves.items():
        axes.plot(*zip(*sorted(curve.items()), strict=True), label=name, **style)
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if curves:
        axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.15), ncols=4, frameon=False)


def main() -> None:
    args = parse_args()
    losses, scores = read_curves(logs_of_run(args.work_dir), args.metrics)
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout='constrained')
    draw(left, losses)
    left.set(title='Training', xlabel='iteration', ylabel='loss')
    left.set_ylim(bottom=0)
    draw(right, scores, marker='o')
    right.set(title='Validation', xlabel='epoch (iteration in runs by iteration)', ylabel='AP')
    right.set_ylim(0, 1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out, dpi=120)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
