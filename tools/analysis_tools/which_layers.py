#!/usr/bin/env python
"""Find out which ODConv layers and attentions of a detector pay: the AP that their dynamics bring.

An attention is made static by giving all images its average over the test images. Each layer in
turn, and each of the attentions in all layers, is made static, and the detector tested again.
"""

import argparse
import json
from operator import itemgetter
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.runner import Runner
from terminaltables import GithubFlavoredMarkdownTable
from torch import Tensor

from mmdet_odconv import cli
from mmdet_odconv.analysis import AttentionMeter, static_attentions
from mmdet_odconv.safe_running import require_datasets, require_weights, unwrapped

Static = dict[str, dict[str, Tensor]]  # means of attentions by layer and by attention


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='test config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', default='which_layers.json', help='JSON file of the results')
    parser.add_argument(
        '--metric', help='metric to compare (default: the first that ends in mAP, or the first)'
    )
    parser.add_argument(
        '--keep-one',
        action='store_true',
        help='also test with each one dynamic alone, all others static: twice the time',
    )
    cli.add_force(parser)
    cli.add_runner_arguments(parser)
    return parser.parse_args()


def metric_of(metrics: dict[str, float], name: str | None) -> str:
    """The metric to compare: the one asked for, else the first AP."""
    if name is None:
        return next((key for key in metrics if key.endswith('mAP')), next(iter(metrics), ''))
    if name not in metrics:
        raise SystemExit(f'--metric {name} is not among those of the test: {", ".join(metrics)}')
    return name


def compare(runner: Runner, name: str | None, keep_one: bool) -> dict:
    """Test with all layers dynamic, with all static, and with each layer and attention static.

    Args:
        runner (Runner): A runner that can test.
        name (str, optional): The metric to compare; None for :func:`metric_of`'s choice.
        keep_one (bool): Whether to test with each of them dynamic alone, too.

    Returns:
        dict: What the JSON file holds.
    """
    meter = AttentionMeter(runner.model)
    with meter, cli.config_errors_as_exit(runner.cfg):
        metrics = runner.test()
    meter.all_reduce()
    metric = metric_of(metrics, name)
    means = meter.means()
    if not means:
        raise SystemExit(f'{runner.cfg.filename}: the detector uses none of its ODConv layers')

    def test_with(static: Static) -> float:
        with static_attentions(runner.model, static):
            return float(runner.test_loop.run()[metric])

    def entry(name: str, part: Static) -> dict[str, Any]:
        without = test_with(part)
        runner.logger.info(f'{metric} is {without:.3f} with {name} static')
        result = dict(name=name, without=without, drop=dynamic - without)
        if keep_one:
            alone = test_with(
                {
                    layer: {n: mean for n, mean in of_layer.items() if n not in part.get(layer, ())}
                    for layer, of_layer in means.items()
                }
            )
            result |= dict(alone=alone, gain=alone - static)
        return result

    dynamic = float(metrics[metric])
    static = test_with(means)
    attentions = [
        entry(name, {layer: {name: m[name]} for layer, m in means.items() if name in m})
        for name in dict.fromkeys(name for of_layer in means.values() for name in of_layer)
    ]
    layers = [
        entry(layer, {layer: means[layer]}) | dict(std=record.std)
        for layer, record in zip(means, meter.statistics(), strict=True)
    ]
    for entries in (attentions, layers):
        entries.sort(key=itemgetter('drop'), reverse=True)
    return dict(metric=metric, dynamic=dynamic, static=static, attentions=attentions, layers=layers)


def table(results: dict) -> str:
    """The results in Markdown, what pays most first."""
    keep_one = 'alone' in results['layers'][0]
    keys = ['without', 'drop'] + ['alone', 'gain'] * keep_one
    titles = ['without it', 'drop'] + ['it alone', 'gain'] * keep_one
    attentions = [['attention', *titles]]
    for entry in results['attentions']:
        attentions.append([entry['name'], *(f'{entry[key]:.3f}' for key in keys)])
    rows = [['layer', 'largest std', *titles]]
    for entry in results['layers']:
        std = max(entry['std'].values(), default=0)
        rows.append([entry['name'], f'{std:.3f}', *(f'{entry[key]:.3f}' for key in keys)])
    return (
        f'{results["metric"]}: {results["dynamic"]:.3f} with all layers dynamic, '
        f'{results["static"]:.3f} with all layers static\n\n'
        f'{GithubFlavoredMarkdownTable(attentions).table}\n\n'
        f'{GithubFlavoredMarkdownTable(rows).table}'
    )


def main() -> None:
    args = parse_args()
    config = cli.runner_config(args, 'test_dataloader', 'test_cfg', 'test_evaluator')
    cli.require_file(args.checkpoint, 'checkpoint')
    require_datasets(config, ('test_dataloader',))
    cli.require_new_file(args.out, args.force)
    config.load_from, config.resume = args.checkpoint, False
    runner = cli.build_runner(config)
    cli.require_odconv_layers(runner.model, args.config)
    require_weights(unwrapped(runner.model), cli.require_checkpoint(args.checkpoint))
    results = compare(runner, args.metric, args.keep_one)
    if is_main_process():
        Path(args.out).write_text(json.dumps(results, indent=2) + '\n', encoding='utf-8')
        print(table(results))
        print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
