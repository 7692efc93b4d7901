#!/usr/bin/env python
"""Make the tables and figures of the study from the logs in docs/study/logs.

Example: python tools/study/table.py   # writes the tables in docs/study.md and docs/study/*.png

With ``--data data/shapes_hard`` it also draws docs/study/task.jpg, images of the task.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use('Agg')
from cycler import cycler
from matplotlib import pyplot as plt
from pycocotools.coco import COCO

FOLDER = Path(__file__).resolve().parents[2] / 'docs/study'
METRICS = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m')
TITLES = ('AP', 'AP50', 'AP75', 'AP small', 'AP medium')
# The tables of a task stand between these two lines of the page. All tasks but the first have their
# logs in a folder of their own.
TASKS = (
    'shapes',
    'light',
    'narrow',
    'pretrained',
    'light_pretrained',
    'small_batch',
    'fine_tune',
    'deeppcb',
)
START, END = '<!-- tables of {}: made by make study -->', '<!-- end of the tables -->'
Log = dict[str, Any]
plt.rcParams['axes.prop_cycle'] = cycler(color=plt.get_cmap('tab20').colors)  # one for each arm


def read(folder: Path) -> dict[str, list[Log]]:
    """The logs of finished runs by arm, arms and seeds in order."""
    arms: dict[str, list[Log]] = {}
    for path in sorted(folder.glob('*.json')):
        log = json.loads(path.read_text(encoding='utf-8'))
        arms.setdefault(log['arm'], []).append(log)
    return arms


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and sample standard deviation; of a single value there is no deviation."""
    mean = f'{statistics.mean(values):.{digits}f}'
    return f'{mean} ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else mean


def final(logs: list[Log], metric: str) -> list[float]:
    """A metric at the end of each run, in points."""
    return [100 * log['evaluations'][-1][metric] for log in logs]


def table(arms: dict[str, list[Log]]) -> str:
    """A Markdown table with one row for each arm, in the order of final AP."""
    head = ['arm', 'seeds', *TITLES, 'training loss', 's/step', 'parameters', 'multiply-adds']
    rows = [head, ['---'] * len(head)]
    for arm in sorted(arms, key=lambda arm: statistics.mean(final(arms[arm], 'mAP'))):
        logs = arms[arm]
        rows.append(
            [
                arm,
                str(len(logs)),
                *(spread(final(logs, metric)) for metric in METRICS),
                spread([log['training'][-1]['loss'] for log in logs], 3),
                spread([log['seconds_per_step'] for log in logs], 2),
                f'{logs[0]["parameters"] / 1e6:.2f} M',
                f'{logs[0]["multiply_adds"] / 1e6:.0f} M',
            ]
        )
    return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def differences(arms: dict[str, list[Log]], ours: str = 'od_k4') -> str:
    """A Markdown table of what separates arms run by run, the two runs of a seed side by side.

    They start from the same seed and see the same images in the same order. The last column has
    by how much ``ours`` is better than the arm.
    """
    head = ['arm', 'AP over `plain`', 'AP small over `plain`', f'`{ours}` over it, AP']
    rows = [head, ['---'] * len(head)]
    for arm in sorted(arms, key=lambda arm: statistics.mean(final(arms[arm], 'mAP'))):
        rows.append([arm, *_gains(arms, arm, ours)])
    return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def best_rates(arms: dict[str, list[Log]], ours: str = 'od_k4') -> str:
    """A Markdown table of arms, each at that of its learning rates which gave the best AP.

    Arms with a single rate are left out; if all have, the table is empty.
    """
    rates: dict[str, dict[float, list[Log]]] = {}
    for name, logs in arms.items():
        arm, _, rate = name.partition('_rate')
        rates.setdefault(arm, {})[float(rate or 1)] = logs
    rates = {arm: tried for arm, tried in rates.items() if len(tried) > 1}
    mean = {
        arm: {rate: statistics.mean(final(logs, 'mAP')) for rate, logs in tried.items()}
        for arm, tried in rates.items()
    }
    best = {arm: max(means, key=means.__getitem__) for arm, means in mean.items()}
    at_best = {arm: rates[arm][best[arm]] for arm in rates}
    head = ['arm', 'AP at each rate', 'best rate', 'seeds', 'AP', 'AP over `plain`']
    head += ['AP small over `plain`', f'`{ours}` over it, AP']
    rows = [head, ['---'] * len(head)]
    for arm in sorted(rates, key=lambda arm: mean[arm][best[arm]]):
        tried = ', '.join(f'{rate:g}: {mean[arm][rate]:.1f}' for rate in sorted(rates[arm]))
        logs = at_best[arm]
        row = [arm, tried, f'{best[arm]:g}', str(len(logs)), spread(final(logs, 'mAP'))]
        rows.append([*row, *_gains(at_best, arm, ours)])
    return ''.join(f'| {" | ".join(row)} |\n' for row in rows) if rates else ''


def comparisons(arms: dict[str, list[Log]]) -> str:
    """The arms at the task's own learning rate, and those of several rates at their best."""
    own_rate = {name: logs for name, logs in arms.items() if '_rate' not in name}
    ours = 'od_k4' if 'od_k4' in own_rate else 'od_k4_ln'
    tables = (differences(own_rate, ours), best_rates(arms, ours))
    return '\n'.join(table for table in tables if table)


def _gains(arms: dict[str, list[Log]], arm: str, ours: str) -> list[str]:
    """What ``arm`` gains over plain in AP and in AP of small objects, and ``ours`` over it."""
    pairs = [('mAP', arm, 'plain'), ('mAP_s', arm, 'plain'), ('mAP', ours, arm)]
    gains = [over(arms, metric, a, b) if a != b else [] for metric, a, b in pairs]
    return [spread(gain) if gain else '' for gain in gains]


def over(arms: dict[str, list[Log]], metric: str, arm: str, other: str) -> list[float]:
    """By how much ``arm`` is better than ``other``, for each seed that both have."""
    finals = [
        {log['seed']: value for log, value in zip(logs, final(logs, metric), strict=True)}
        for logs in (arms.get(arm, []), arms.get(other, []))
    ]
    return [finals[0][seed] - finals[1][seed] for seed in sorted(set(finals[0]) & set(finals[1]))]


def curves(arms: dict[str, list[Log]], path: Path) -> None:
    """AP after each evaluation, and the training loss, with bands of one standard deviation."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
    for arm, logs in arms.items():
        evaluations = zip(*(log['evaluations'] for log in logs), strict=False)
        points = [(e[0]['epoch'], [100 * one['mAP'] for one in e]) for e in evaluations]
        _band(left, points, arm)
        training = zip(*(log['training'] for log in logs), strict=False)
        _band(right, [(t[0]['iteration'], [one['loss'] for one in t]) for t in training], arm)
    left.set(xlabel='epoch', ylabel='AP')
    right.set(xlabel='iteration', ylabel='training loss', yscale='log')
    figure.legend(*left.get_legend_handles_labels(), loc='outside right center', frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _band(axes: Any, points: list[tuple[float, list[float]]], label: str) -> None:
    x = [place for place, _ in points]
    mean = [statistics.mean(values) for _, values in points]
    deviation = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
    (line,) = axes.plot(x, mean, label=label, marker='o' if len(x) < 10 else None, markersize=3)
    low = [m - d for m, d in zip(mean, deviation, strict=True)]
    high = [m + d for m, d in zip(mean, deviation, strict=True)]
    axes.fill_between(x, low, high, alpha=0.2, color=line.get_color())


def costs(arms: dict[str, list[Log]], path: Path) -> None:
    """Final AP against multiply-adds and against the time of a step."""
    figure, both = plt.subplots(1, 2, figsize=(11, 4), layout='constrained', sharey=True)
    for axes, name, unit, label in zip(
        both,
        ('multiply_adds', 'seconds_per_step'),
        (1e6, 1),
        ('million multiply-adds an image', 'seconds a training step'),
        strict=True,
    ):
        for arm, logs in arms.items():
            x = statistics.mean(log[name] / unit for log in logs)
            values = final(logs, 'mAP')
            y = statistics.mean(values)
            error = statistics.stdev(values) if len(values) > 1 else math.nan
            axes.errorbar(x, y, error, fmt='o', capsize=3, label=arm)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    both[0].set(ylabel='AP')
    figure.legend(*both[0].get_legend_handles_labels(), loc='outside right center', frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def task(data: Path, path: Path, number: int = 10) -> None:
    """The first validation images with their boxes and classes."""
    coco = COCO(data / 'annotations/instances_val.json')
    figure, grid = plt.subplots(
        2, number // 2, figsize=(2.4 * number // 2, 5), layout='constrained'
    )
    for axes, image in zip(grid.flat, coco.loadImgs(coco.getImgIds()[:number]), strict=True):
        axes.imshow(plt.imread(data / 'val' / image['file_name']))
        for annotation in coco.loadAnns(coco.getAnnIds(image['id'])):
            x, y, width, height = annotation['bbox']
            axes.add_patch(plt.Rectangle((x, y), width, height, fill=False, color='w', lw=0.8))
            name = coco.cats[annotation['category_id']]['name']
            axes.text(x, y - 1, name, fontsize=5, color='k', backgroundcolor='w').set_bbox(
                dict(facecolor='w', alpha=0.6, pad=0.5, lw=0)
            )
        axes.axis('off')
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description='Make the tables and figures of the study.')
    parser.add_argument('--logs', type=Path, default=FOLDER / 'logs')
    parser.add_argument('--out', type=Path, default=FOLDER)
    parser.add_argument('--page', type=Path, default=FOLDER.with_suffix('.md'))
    parser.add_argument('--data', type=Path, help='folder of the images, for a picture of them')
    args = parser.parse_args(argv)
    arms = read(args.logs)
    if not arms:
        parser.error(f'{args.logs} has no log; tools/study/run.py makes them')
    args.out.mkdir(parents=True, exist_ok=True)
    page = args.page.read_text(encoding='utf-8') if args.page.exists() else ''
    for task_name in TASKS:
        own = arms if task_name == TASKS[0] else read(args.logs / task_name)
        if own:
            tables = f'{table(own)}\n{comparisons(own)}'
            page = _put(tables, START.format(task_name), page)
            print(task_name, tables, sep='\n\n')
    if page:
        args.page.write_text(page, encoding='utf-8')
    curves(arms, args.out / 'curves.png')
    costs(arms, args.out / 'costs.png')
    if args.data:
        task(args.data, args.out / 'task.jpg')


def _put(tables: str, start: str, page: str) -> str:
    """The page with these tables after the line ``start``, if it has such a line."""
    before, found, rest = page.partition(start)
    return f'{before}{found}\n{tables}{END}{rest.partition(END)[2]}' if found else page


if __name__ == '__main__':
    main()
