#!/usr/bin/env python
"""Fine-tune ODConv from static weights on BCCD in several ways, and write a table in Markdown.

The detector is that of configs/odconv/retinanet_od_mobilenetv2_bccd.py. It starts from the
checkpoint of its plain twin (--detector), or its backbone starts from the ImageNet weights of
a MobileNetV2 of width 1.0 under torchvision's names (--imagenet). Every run is kept in
WORK_DIR/results.json: started again, the tool makes those that are missing.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmdet_odconv import ODConv2d, cli, load_published_checkpoint
from mmdet_odconv.safe_running.dataset_checks import DATALOADERS, require_datasets

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / 'configs/odconv/retinanet_od_mobilenetv2_bccd.py'

NORMS = {
    'BN': dict(type='BN'),
    'frozen BN': dict(type='BN'),
    'LN': dict(type='LN'),
    'none': None,
}
ATTENTION_RATE = 0.1  # relative to the rest, as in the COCO configs


@dataclass(frozen=True)
class Way:
    """One way to fine-tune.

    Attributes:
        bias (float, optional): ``attention_bias``; None for plain convolutions. Default: None.
        compensated (bool): Whether the banks' rate makes up for the constant attentions
            (:class:`~mmdet_odconv.ODConvOptimWrapperConstructor`). Default: False.
        norm (str): Norm of the attention, a key of ``NORMS``. Default: 'BN'.
        slower (float): What the learning rate of everything is divided by. Default: 1.
    """

    bias: float | None = None
    compensated: bool = False
    norm: str = 'BN'
    slower: float = 1

    @property
    def layers(self) -> str:
        """What the untrained detector depends on."""
        return 'plain' if self.bias is None else f'bias {self.bias}, {self.norm}'


@dataclass(frozen=True)
class Start:
    """What a run starts from, and how long it goes on.

    Attributes:
        rate (float): Learning rate of SGD.
        epochs (int): Epochs; the rate falls by a cosine.
        width (float): ``widen_factor`` of the backbone.
        channels (list[int]): Channels of the backbone's four maps.
    """

    rate: float
    epochs: int
    width: float
    channels: list[int]


STARTS = {
    'detector': Start(0.01, 2, 0.5, [16, 16, 48, 1280]),
    'imagenet': Start(0.02, 4, 1.0, [24, 32, 96, 1280]),
}
WAYS = {
    'plain': Way(),
    'bias2.2': Way(2.2),
    'bias2.2-compensated': Way(2.2, compensated=True),
    'bias0': Way(0.0),
    'bias0-compensated': Way(0.0, compensated=True),
    'frozenBN': Way(2.2, norm='frozen BN'),
    'LN': Way(2.2, norm='LN'),
    'none': Way(2.2, norm='none'),
    'plain-slower': Way(slower=5),
}


@HOOKS.register_module()
class FrozenAttentionNorms(Hook):
    """Keeps the attentions' BatchNorms at their running statistics, as ``norm_eval`` does.

    A load of static weights leaves these at 0 and 1. Weight and bias of the norms train.
    """

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        for module in runner.model.modules():
            if isinstance(module, ODConv2d):
                module.attention.bn.eval()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--detector', help='checkpoint of the plain twin')
    parser.add_argument('--imagenet', help='weights of a MobileNetV2 1.0')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/warm_start'))
    parser.add_argument(
        '--seeds', type=cli.positive, default=3, help='runs of each way (default: 3)'
    )
    parser.add_argument('--ways', nargs='+', choices=WAYS, default=list(WAYS), help='default: all')
    return parser.parse_args()


def run_config(start: str, way: Way, weights: str) -> Config:
    """The config of a run but for its seed and work folder."""
    config = cli.load_config(str(CONFIG))
    settings = STARTS[start]
    backbone = config.model.backbone
    backbone.widen_factor = settings.width
    config.model.neck.in_channels = settings.channels
    if way.bias is None:
        backbone.type = 'MobileNetV2'
    else:
        backbone.odconv_cfg = dict(attention_bias=way.bias, norm_cfg=NORMS[way.norm])
    if way.norm == 'frozen BN':
        config.custom_hooks = [dict(type='FrozenAttentionNorms')]
    if start == 'detector':
        config.load_from = weights
    else:
        backbone.init_cfg = dict(type='Pretrained', checkpoint=weights)

    config.optim_wrapper.update(
        optimizer=dict(type='SGD', lr=settings.rate / way.slower, momentum=0.9, weight_decay=1e-4),
        constructor='ODConvOptimWrapperConstructor',
        paramwise_cfg=dict(
            attention_lr_mult=ATTENTION_RATE,
            bank_lr_mult='compensated' if way.compensated else 1.0,
        ),
    )
    epochs = settings.epochs
    config.param_scheduler = [
        dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=10),
        dict(type='CosineAnnealingLR', T_max=epochs, end=epochs, convert_to_iter_based=True),
    ]
    config.train_cfg.update(max_epochs=epochs, val_begin=epochs + 1)
    config.default_hooks.checkpoint = dict(
        type='CheckpointHook', interval=epochs, save_optimizer=False
    )
    for name in DATALOADERS:
        config[name].update(num_workers=0, persistent_workers=False)
    return config


def evaluate(config: Config) -> dict[str, float]:
    """The AP before any step."""
    return dict(ap=Runner.from_cfg(config).test()['coco/bbox_mAP'])


def fine_tune(config: Config) -> dict[str, float]:
    """The AP and the last epoch's mean training loss of a run, and the minutes it took."""
    runner = Runner.from_cfg(config)
    begin = time.monotonic()
    runner.train()
    minutes = (time.monotonic() - begin) / 60
    loss = runner.message_hub.get_scalar('train/loss').mean(len(runner.train_dataloader))
    return dict(ap=runner.test()['coco/bbox_mAP'], loss=float(loss), minutes=minutes)


def mmdet_backbone(path: str, out: Path) -> str:
    """ImageNet weights under the names of mmdet's backbone."""
    if not out.is_file():
        backbone = MODELS.build(dict(type='mmdet.MobileNetV2'))
        load_published_checkpoint(backbone, path)
        torch.save(backbone.state_dict(), out)
    return str(out)


def table(results: dict[str, dict[str, float]]) -> str:
    """The rows of which there are results, mean ± standard deviation over the seeds."""
    lines = [
        '| start | rate | convolutions | bias | bank rate | norm '
        '| AP before | AP after | runs | loss | min/run |',
        '|---|---|---|---|---|---|---|---|---|---|---|',
    ]
    for start in STARTS:
        for name, way in WAYS.items():
            prefix = f'{start}/{name}/'
            runs = [r for k, r in results.items() if k.startswith(prefix) and 'loss' in r]
            if not runs:
                continue
            before = results.get(f'{start}/before/{way.layers}')
            what = ['plain', '', '', '']
            if way.bias is not None:
                rate = 'compensated' if way.compensated else '1'
                what = ['ODConv', str(way.bias), rate, way.norm]
            cells = [
                *(start, f'{STARTS[start].rate / way.slower:g}', *what),
                f'{before["ap"]:.3f}' if before else '',
                spread([run['ap'] for run in runs], 3),
                str(len(runs)),
                spread([run['loss'] for run in runs], 3),
                f'{statistics.mean(run["minutes"] for run in runs):.1f}',
            ]
            lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def spread(values: list[float], digits: int) -> str:
    """Mean ± sample standard deviation."""
    mean = f'{statistics.mean(values):.{digits}f}'
    return f'{mean} ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else mean


def main() -> None:
    args = parse_args()
    register_all_modules()
    require_datasets(cli.load_config(str(CONFIG)))
    args.work_dir.mkdir(parents=True, exist_ok=True)
    file = args.work_dir / 'results.json'
    results = json.loads(file.read_text(encoding='utf-8')) if file.is_file() else {}
    weights = {}
    if args.detector:
        cli.require_checkpoint(args.detector)
        weights['detector'] = args.detector
    if args.imagenet:
        cli.require_file(args.imagenet, 'checkpoint')
        weights['imagenet'] = mmdet_backbone(args.imagenet, args.work_dir / 'imagenet.pth')

    def keep(key: str, run: Callable[[Config], dict[str, float]], config: Config) -> None:
        """Make a run and note its result, unless that has been done."""
        if key not in results:
            config.experiment_name = re.sub(r'[^\w.]+', '-', key)
            config.work_dir = str(args.work_dir / config.experiment_name)
            results[key] = run(config)
            file.write_text(json.dumps(results, indent=1), encoding='utf-8')

    for start, path in weights.items():
        for name in args.ways:
            config = run_config(start, WAYS[name], path)
            # A head that is yet to be trained finds nothing.
            if start == 'detector':
                keep(f'{start}/before/{WAYS[name].layers}', evaluate, deepcopy(config))
            for seed in range(args.seeds):
                config.randomness = dict(seed=seed)
                keep(f'{start}/{name}/{seed}', fine_tune, deepcopy(config))
    print(table(results))


if __name__ == '__main__':
    main()
