#!/usr/bin/env python
"""Make the tables and figures of the study from the logs in docs/study/logs.

Example: python tools/study/table.py   # the tables of docs/study.md and docs/study/*.md, figures

With ``--data data/shapes_hard`` it also draws docs/study/task.jpg, images of the task.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use('Agg')
from arms import split_rate
from matplotlib import pyplot as plt
from pycocotools.coco import COCO

FOLDER = Path(__file__).resolve().parents[2] / 'docs/study'
METRICS = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m')
TITLES = ('AP', 'AP50', 'AP75', 'AP small', 'AP medium')
# The tasks that the figures show.
MAIN_TASK, FINE_TUNING = 'narrow', 'fine_tune'
# The tables of a task, or that of a question, stand between two such lines of a page.
START, END = '<!-- tables of {}: made by make study -->', '<!-- end of the tables -->'
ANSWER = '<!-- table for {}: made by make study -->'
# The tables that answer a question. Of each row: what it is, its task, its arm, and the arm of the
# same task that it is compared with.
Row = tuple[str, str, str, str]
QUESTIONS: dict[str, list[Row]] = {
    'imagenet': [
        ('EfficientNet-Lite0', 'hituav_lite0', 'plain', 'plain'),
        ('Lite0, ODConv K = 1', 'hituav_lite0', 'od_k1_pointwise_attention10', 'plain'),
        ('Lite0, ODConv K = 4', 'hituav_lite0', 'od_k4_pointwise_attention10', 'plain'),
        ('EfficientNet-Lite1', 'hituav_lite0', 'plain_lite1', 'plain'),
        ('scans: Lite0, ODConv K = 1', 'deeppcb_lite0', 'od_k1_pointwise_attention10', 'plain'),
        ('scans: Lite0, ODConv K = 4', 'deeppcb_lite0', 'od_k4_pointwise_attention10', 'plain'),
    ],
    'detectors': [
        (
            'generated images, 8 channels',
            'fine_tune',
            'od_k4_running_rate24',
            'plain_rate24',
        ),
        (
            'the same, from another trained detector',
            'fine_tune',
            'od_k4_running_start2_rate24',
            'plain_start2_rate24',
        ),
        ('16 channels', 'fine_tune_light', 'od_k4_running_rate24', 'plain_rate24'),
        ('MobileNetV2', 'fine_tune_mobile', 'od_k4_running_rate12', 'plain_rate24'),
        ('real scans, 8 channels', 'fine_tune_deeppcb', 'od_k4_ln_rate12', 'plain_rate12'),
    ],
    'layers': [
        ('DyConv, K = 4', 'fine_tune', 'dyconv_k4_rate24', 'plain_rate24'),
        ('CondConv, K = 4', 'fine_tune', 'condconv_k4_rate24', 'plain_rate24'),
        ('ODConv, K = 1', 'fine_tune', 'od_k1_running_rate24', 'plain_rate24'),
        ('ODConv, K = 4', 'fine_tune', 'od_k4_running_rate24', 'plain_rate24'),
        ('9 channels, plain', 'fine_tune', 'plain_wide_madds_rate24', 'plain_rate24'),
        ('real scans: CondConv, K = 4', 'fine_tune_deeppcb', 'condconv_k4_rate12', 'plain_rate12'),
    ],
    'norms': [
        ('2 images, BatchNorm', 'fine_tune_batch2', 'od_k4', 'plain'),
        ('2 images, LayerNorm', 'fine_tune_batch2', 'od_k4_ln', 'plain'),
        ('8 images, BatchNorm', 'fine_tune_batch8', 'od_k4', 'plain'),
        ('8 images, LayerNorm', 'fine_tune_batch8', 'od_k4_ln', 'plain'),
        ('16 images, LayerNorm', 'fine_tune', 'od_k4_ln_rate24', 'plain_rate24'),
        ('16 images from scratch, BatchNorm', 'narrow', 'od_k4', 'plain'),
        ('16 images from scratch, LayerNorm', 'narrow', 'od_k4_ln', 'plain'),
    ],
    'scratch': [
        ('8 channels: ODConv, K = 1', 'narrow', 'od_k1', 'plain'),
        ('8 channels: ODConv, K = 4', 'narrow', 'od_k4', 'plain'),
        ('8 channels: CondConv, K = 4', 'narrow', 'condconv_k4', 'plain'),
        ('9 channels, plain', 'narrow', 'plain_wide_madds', 'plain'),
        ('16 channels: ODConv, K = 4', 'light', 'od_k4', 'plain'),
        ('MobileNetV2: ODConv, K = 4', 'mobile', 'od_k4', 'plain'),
        ('MobileNetV2 of 19 % more multiply-adds', 'mobile', 'plain_wide_madds', 'plain'),
    ],
}
LEGEND: dict[str, Any] = dict(loc='outside lower center', ncols=3, frameon=False)
Log = dict[str, Any]


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
    head = [
        'arm',
        'seeds',
        *TITLES,
        'training loss',
        'time of a step',
        'parameters',
        'multiply-adds',
    ]
    rows = [head, ['---'] * len(head)]
    for arm in sorted(arms, key=lambda arm: statistics.mean(final(arms[arm], 'mAP'))):
        logs = arms[arm]
        rows.append(
            [
                arm,
                str(len(logs)),
                *(spread(final(logs, metric)) for metric in METRICS),
                spread([log['training'][-1]['loss'] for log in logs], 3),
                f'{statistics.mean(log["step_time"] for log in logs):.2f}',
                f'{logs[0]["parameters"] / 1e6:.2f} M',
                f'{logs[0]["multiply_adds"] / 1e6:.0f} M',
            ]
        )
    return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def dynamics(arms: dict[str, list[Log]]) -> str:
    """A Markdown table of how dynamic the arms are, '' where no log says so.

    The standard deviation of each attention over the validation images is the median over the
    layers. A layer is dynamic if that of one of its attentions is 0.02 or more. The last column has
    the AP that is left when every image gets the mean attentions.
    """
    names = ('channel', 'filter', 'spatial', 'kernel')
    head = ['arm', *names, 'dynamic layers', 'AP', 'AP, attentions at their means']
    rows = [head, ['---'] * len(head)]
    for arm, logs in arms.items():
        logs = [log for log in logs if 'attention_std' in log]
        if logs:
            stds = [[log['attention_std'].get(name, 0.0) for log in logs] for name in names]
            rows.append(
                [
                    arm,
                    *(f'{statistics.mean(values):.4f}' for values in stds),
                    f'{statistics.mean(log["dynamic_layers"] for log in logs):.0%}',
                    spread(final(logs, 'mAP')),
                    spread([100 * log['mAP_static'] for log in logs]),
                ]
            )
    return ''.join(f'| {" | ".join(row)} |\n' for row in rows) if len(rows) > 2 else ''


def differences(arms: dict[str, list[Log]]) -> str:
    """A Markdown table of what separates arms run by run, the two runs of a seed side by side.

    The two have the same learning rate, start from the same seed and see the same images in the
    same order. The last column has by how much our arm is better than the arm of the row.
    """
    ours = our_arm(arms)
    head = ['rate', 'arm', 'AP over `plain`', 'AP small over `plain`', f'`{ours}` over it, AP']
    rows = [head, ['---'] * len(head)]
    for rate in sorted({split_rate(name)[1] for name in arms}):
        alike = at_rate(arms, rate)
        for arm in sorted(alike, key=lambda arm: statistics.mean(final(alike[arm], 'mAP'))):
            gains = _gains(alike, arm, ours)
            if arm != 'plain' and any(gains):
                rows.append([f'{rate:g}', arm, *gains])
    return ''.join(f'| {" | ".join(row)} |\n' for row in rows) if len(rows) > 2 else ''


def best_rates(arms: dict[str, list[Log]]) -> str:
    """A Markdown table of arms, each at that of its learning rates which gave the best AP.

    Arms with a single rate are left out; if all have, the table is empty.
    """
    ours = our_arm(arms)
    rates = by_rate(arms)
    mean = {
        arm: {rate: statistics.mean(final(logs, 'mAP')) for rate, logs in tried.items()}
        for arm, tried in rates.items()
    }
    best = {arm: best_rate(tried) for arm, tried in rates.items()}
    at_best = {arm: rates[arm][best[arm]] for arm in rates}
    head = ['arm', 'AP at each rate', 'best rate', 'seeds', 'AP', 'AP over `plain`']
    head += ['AP small over `plain`', f'`{ours}` over it, AP']
    rows = [head, ['---'] * len(head)]
    for arm in sorted(rates, key=lambda arm: mean[arm][best[arm]]):
        tried = ', '.join(f'{rate:g}: {ap:.1f}' for rate, ap in mean[arm].items())
        logs = at_best[arm]
        row = [arm, tried, f'{best[arm]:g}', str(len(logs)), spread(final(logs, 'mAP'))]
        rows.append([*row, *_gains(at_best, arm, ours)])
    return ''.join(f'| {" | ".join(row)} |\n' for row in rows) if rates else ''


def answer(rows: list[Row], tasks: dict[str, dict[str, list[Log]]]) -> str:
    """A Markdown table of what each row gains over its plain network, over the seeds of both.

    With ImageNet weights it also has what is left of the AP when every image gets the mean
    attentions, and the times of a training step and of a test image, of the plain network 1.
    """
    real = all('image_time' in tasks[task][arm][0] for _, task, arm, _ in rows)
    head = ['', 'runs', 'AP, plain', 'AP', 'gain', 'gain, small objects', 'parameters']
    if real:
        head += ['AP at mean attentions', 'step', 'image']
    lines = [head, ['---'] * len(head)]
    for label, task, arm, plain in rows:
        arms = tasks[task]
        seeds = [{log['seed'] for log in arms[name]} for name in (arm, plain)]
        ours, theirs = (
            [log for log in arms[name] if log['seed'] in seeds[0] & seeds[1]]
            for name in (arm, plain)
        )
        line = [
            label,
            str(len(ours)),
            spread(final(theirs, 'mAP')),
            spread(final(ours, 'mAP')),
            *(spread(over(arms, metric, arm, plain)) for metric in ('mAP', 'mAP_s')),
            f'{ours[0]["parameters"] / theirs[0]["parameters"]:.1f} ×',
        ]
        if real:
            static = [100 * log['mAP_static'] for log in ours if 'mAP_static' in log]
            line.append(spread(static) if static else '')
            line += [
                f'{statistics.mean(log[name] for log in ours):.2f} ×'
                for name in ('step_time', 'image_time')
            ]
        lines.append(line)
    return ''.join(f'| {" | ".join(row)} |\n' for row in lines)


def by_rate(arms: dict[str, list[Log]]) -> dict[str, dict[float, list[Log]]]:
    """The arms that have several learning rates, with the logs of each, lowest rate first."""
    rates: dict[str, dict[float, list[Log]]] = {}
    for name, logs in arms.items():
        arm, rate = split_rate(name)
        rates.setdefault(arm, {})[rate] = logs
    return {arm: dict(sorted(tried.items())) for arm, tried in rates.items() if len(tried) > 1}


def at_rate(arms: dict[str, list[Log]], rate: float) -> dict[str, list[Log]]:
    """The arms at this learning rate, relative to the task's, without the rate in their names."""
    split = ((split_rate(name), logs) for name, logs in arms.items())
    return {arm: logs for (arm, factor), logs in split if factor == rate}


def best_rate(tried: dict[float, list[Log]]) -> float:
    """The learning rate with the highest mean AP."""
    return max(tried, key=lambda rate: statistics.mean(final(tried[rate], 'mAP')))


def our_arm(arms: dict[str, list[Log]]) -> str:
    """The ODConv of four kernels that other arms are compared with: that with the most seeds."""
    seeds = dict.fromkeys(('od_k4', 'od_k4_ln', 'od_k4_running'), 0)
    for name, logs in arms.items():
        arm, _ = split_rate(name)
        if arm in seeds:
            seeds[arm] = max(seeds[arm], len(logs))
    return max(seeds, key=lambda arm: seeds[arm])


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


def arm_colors(arms: dict[str, list[Log]]) -> dict[str, Any]:
    """A colour for each arm, the same in all figures of a task."""
    return dict(zip(arms, mpl.color_sequences['tab20'], strict=False))


def curves(arms: dict[str, list[Log]], path: Path) -> None:
    """AP after each evaluation, and the training loss, with bands of one standard deviation."""
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(6.5, 8.5), layout='constrained')
    colors = arm_colors(arms)
    for arm, logs in arms.items():
        color = colors[arm]
        evaluations = zip(*(log['evaluations'] for log in logs), strict=False)
        points = [(e[0]['epoch'], [100 * one['mAP'] for one in e]) for e in evaluations]
        _band(upper, points, color, label=arm, marker='o', markersize=3)
        training = zip(*(log['training'] for log in logs), strict=False)
        _band(lower, [(t[0]['iteration'], [one['loss'] for one in t]) for t in training], color)
    upper.set(xlabel='epoch', ylabel='AP')
    upper.xaxis.get_major_locator().set_params(integer=True)
    lower.set(xlabel='iteration', ylabel='training loss', yscale='log')
    figure.legend(**LEGEND)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _band(axes: Any, points: list[tuple[float, list[float]]], color: Any, **line: Any) -> None:
    x = [place for place, _ in points]
    mean = [statistics.mean(values) for _, values in points]
    deviation = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
    axes.plot(x, mean, color=color, **line)
    low = [m - d for m, d in zip(mean, deviation, strict=True)]
    high = [m + d for m, d in zip(mean, deviation, strict=True)]
    axes.fill_between(x, low, high, alpha=0.2, color=color)


def costs(arms: dict[str, list[Log]], path: Path) -> None:
    """Final AP of each run, and its mean against multiply-adds and the time of a step."""
    order = sorted(arms, key=lambda arm: statistics.mean(final(arms[arm], 'mAP')))
    figure, (runs, *both) = plt.subplots(3, 1, figsize=(6.5, 11.5), layout='constrained')
    colors = arm_colors(arms)
    for place, arm in enumerate(order):
        values = final(arms[arm], 'mAP')
        runs.plot(values, [place] * len(values), 'o', color=colors[arm])
        runs.plot(statistics.mean(values), place, '|', color='k', markersize=16)
    runs.set(xlabel='AP of each run (the bar is the mean)', yticks=range(len(order)))
    runs.set_yticklabels(order)
    for axes, name, unit, label in zip(
        both,
        ('multiply_adds', 'step_time'),
        (1e6, 1),
        ('million multiply-adds an image', 'time of a training step, plain = 1'),
        strict=True,
    ):
        for arm in order:
            x = statistics.mean(log[name] / unit for log in arms[arm])
            y = statistics.mean(final(arms[arm], 'mAP'))
            axes.plot(x, y, 'o', color=colors[arm], markersize=8, label=arm)
        axes.set(xlabel=label, ylabel='AP')
    figure.legend(*both[0].get_legend_handles_labels(), **LEGEND)
    for axes in (runs, *both):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def rate_curves(arms: dict[str, list[Log]], path: Path) -> None:
    """Final AP of each run against the learning rate, for the arms that have several rates."""
    figure, axes = plt.subplots(figsize=(6.5, 4), layout='constrained')
    shown = by_rate(arms)
    for place, (arm, tried) in enumerate(shown.items()):
        means = [statistics.mean(final(logs, 'mAP')) for logs in tried.values()]
        axes.plot(list(tried), means, color=f'C{place}', label=arm)
        for rate, logs in tried.items():
            values = final(logs, 'mAP')
            axes.plot([rate] * len(values), values, 'o', color=f'C{place}', alpha=0.6)
    axes.set(xscale='log', xlabel="learning rate, relative to the task's", ylabel='AP of each run')
    axes.set_xticks(sorted({rate for tried in shown.values() for rate in tried}))
    axes.xaxis.set_major_formatter('{x:g}')
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def gains(rows: list[Row], tasks: dict[str, dict[str, list[Log]]], path: Path) -> None:
    """What each row gains over its plain network: a point for each seed, a bar for the mean."""
    figure, axes = plt.subplots(figsize=(6.5, 0.4 * len(rows) + 0.8), layout='constrained')
    for place, (_, name, arm, plain) in enumerate(rows):
        found = over(tasks[name], 'mAP', arm, plain)
        axes.plot(found, [place] * len(found), 'o', color='C0', alpha=0.7)
        axes.plot(statistics.mean(found), place, '|', color='k', markersize=18)
    axes.set(xlabel='gain in AP over the plain network', yticks=range(len(rows)))
    axes.set_yticklabels([row[0] for row in rows])
    axes.axvline(0, color='k', linewidth=0.8)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def gain_against_time(rows: list[Row], tasks: dict[str, dict[str, list[Log]]], path: Path) -> None:
    """What each row gains, seed by seed, against the time of a test image.

    A line joins the plain networks.
    """
    figure, axes = plt.subplots(figsize=(6.5, 4), layout='constrained')
    line: list[tuple[float, float]] = []
    for label, name, arm, plain in rows:
        found = over(tasks[name], 'mAP', arm, plain)
        point = (
            statistics.mean(log['image_time'] for log in tasks[name][arm]),
            statistics.mean(found),
        )
        color = 'k' if arm.startswith('plain') else None
        (mark,) = axes.plot(*point, 'o', color=color, markersize=8)
        axes.plot([point[0]] * len(found), found, '_', color=mark.get_color(), markersize=10)
        axes.annotate(
            label,
            point,
            (10, -3),
            textcoords='offset points',
            fontsize=9,
            bbox=dict(facecolor='w', alpha=0.8, pad=0.5, lw=0),
        )
        if color:
            line.append(point)
    axes.plot(*zip(*sorted(line), strict=True), 'k--', linewidth=1)
    axes.set(
        xlabel='time of a test image, plain EfficientNet-Lite0 = 1',
        ylabel='gain in AP over plain Lite0 (bars: seeds)',
    )
    axes.margins(x=0.45, y=0.15)
    axes.grid(alpha=0.3)
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
    parser.add_argument(
        '--pages', type=Path, nargs='+', default=[FOLDER.with_suffix('.md'), *FOLDER.glob('*.md')]
    )
    parser.add_argument('--data', type=Path, help='folder of the images, for a picture of them')
    args = parser.parse_args(argv)
    tasks = {folder.name: read(folder) for folder in sorted(args.logs.glob('*/'))}
    if MAIN_TASK not in tasks:
        parser.error(f'{args.logs} has no log of {MAIN_TASK}; tools/study/run.py makes them')
    args.out.mkdir(parents=True, exist_ok=True)
    for path in args.pages:
        path.write_text(with_tables(path.read_text(encoding='utf-8'), tasks), encoding='utf-8')
    shown = at_rate(tasks[MAIN_TASK], 1.0)
    curves(shown, args.out / 'curves.png')
    costs(shown, args.out / 'costs.png')
    if FINE_TUNING in tasks:
        rate_curves(tasks[FINE_TUNING], args.out / 'rates.png')
    rows = finished(QUESTIONS['detectors'], tasks)
    if rows:
        gains(rows, tasks, args.out / 'gains.png')
    one_task = [row for row in QUESTIONS['imagenet'] if row[1] == 'hituav_lite0']
    if rows := finished(one_task, tasks):
        gain_against_time(rows, tasks, args.out / 'gain_time.png')
    if args.data:
        task(args.data, args.out / 'task.jpg')


def with_tables(page: str, tasks: dict[str, dict[str, list[Log]]]) -> str:
    """The page with the tables of all tasks and questions for which it has a place."""
    for name, arms in tasks.items():
        parts = (table(arms), dynamics(arms), differences(arms), best_rates(arms))
        tables = '\n'.join(filter(None, parts))
        page = _put(tables, START.format(name), page)
    for name, rows in QUESTIONS.items():
        if done := finished(rows, tasks):
            page = _put(answer(done, tasks), ANSWER.format(name), page)
    return page


def finished(rows: list[Row], tasks: dict[str, dict[str, list[Log]]]) -> list[Row]:
    """The rows whose runs have logs."""
    return [row for row in rows if {row[2], row[3]} <= tasks.get(row[1], {}).keys()]


def _put(tables: str, start: str, page: str) -> str:
    """The page with these tables after the line ``start``, if it has such a line."""
    before, found, rest = page.partition(start)
    return f'{before}{found}\n{tables}{END}{rest.partition(END)[2]}' if found else page


if __name__ == '__main__':
    main()
