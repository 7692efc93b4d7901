#!/usr/bin/env python
"""Test a detector; the command line is that of mmdet's tools/test.py, --fuse-conv-bn and --onnx."""

import argparse
import os
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from mmdet.engine.hooks.utils import trigger_visualization_hook
from mmdet.evaluation import DumpDetResults
from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config, ConfigDict
from mmengine.hooks import EMAHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from mmdet_odconv import cli, prepare_for_inference
from mmdet_odconv.deployment import use_onnx_network
from mmdet_odconv.safe_running import require_datasets, require_weights


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Test (and evaluate) a detector')
    parser.add_argument('config', help='test config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', help='pickle file to write the predictions to')
    parser.add_argument('--show', action='store_true', help='show the predictions')
    parser.add_argument(
        '--show-dir', help='folder for painted images, made in <work dir>/<timestamp>'
    )
    parser.add_argument('--wait-time', type=float, default=2, help='seconds between shows')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    network = parser.add_mutually_exclusive_group()
    network.add_argument(
        '--fuse-conv-bn',
        action='store_true',
        help='fold the BatchNorms into the convolutions before them, ODConv and plain',
    )
    network.add_argument(
        '--onnx',
        help='file of tools/deployment/export_onnx.py to use in place of backbone, neck and head',
    )
    cli.add_collapse(parser)
    cli.add_runner_arguments(parser)
    args = parser.parse_args()
    if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out must end in .pkl or .pickle, got {args.out}')
    return args


def use_tta(config: Config) -> None:
    """Put the model into mmdet's test-time augmentation: the config's own, else a flip."""
    config.setdefault(
        'tta_model',
        dict(
            type='DetTTAModel',
            tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
        ),
    )
    dataset = config.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if 'tta_pipeline' not in config:
        flips = [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)]
        pack = deepcopy(dataset.pipeline[-1])
        pack.meta_keys = (*pack.get('meta_keys', ()), 'flip', 'flip_direction')
        augmentation = dict(type='TestTimeAug', transforms=[flips, [pack]])
        config.tta_pipeline = [*deepcopy(dataset.pipeline[:-1]), augmentation]
    config.model = ConfigDict(**config.tta_model, module=config.model)
    dataset.pipeline = config.tta_pipeline


def drop_ema(config: Config) -> None:
    """Drop the EMA hook: it would test a copy of the model in place of the changed one.

    A checkpoint saved under it has the averaged weights as its state dict, so none are lost.
    """
    hooks = config.get('custom_hooks') or []
    config.custom_hooks = [hook for hook in hooks if not _is_ema(hook['type'])]


def _is_ema(kind: str | type) -> bool:
    """Whether a hook's type, a name with or without a scope or a class, is an EMA hook."""
    found = HOOKS.get(kind) if isinstance(kind, str) else kind
    return isinstance(found, type) and issubclass(found, EMAHook)


def detector_of(model: nn.Module) -> nn.Module:
    """The detector in the wrappers of distributed runs and of test-time augmentation."""
    while isinstance(getattr(model, 'module', None), nn.Module):
        model = model.module
    return model


def require_fit(runner: Runner, path: str) -> None:
    """End the program unless the checkpoint fits the detector of the runner."""
    checkpoint = cli.require_checkpoint(path)
    require_weights(detector_of(runner.model), checkpoint)
    warn_of_classes(runner, checkpoint.meta)


def warn_of_classes(runner: Runner, meta: dict[str, Any]) -> None:
    """Say so if the checkpoint was trained for other classes than the data set has."""
    trained = (meta.get('dataset_meta') or {}).get('classes')
    tested = runner.test_dataloader.dataset.metainfo.get('classes')
    if trained and tested and tuple(trained) != tuple(tested):
        runner.logger.warning(
            f'The checkpoint was trained for the classes {_listed(trained)}, but the data set of '
            f'test_dataloader has {_listed(tested)}: is this the config it was trained with?'
        )


def _listed(names: Sequence[str]) -> str:
    return f'({", ".join(names[:5])}{", …" if len(names) > 5 else ""})'


def main() -> None:
    args = parse_args()
    setup_cache_size_limit_of_dynamo()
    config = cli.runner_config(args, 'test_dataloader', 'test_cfg', 'test_evaluator')
    cli.require_file(args.checkpoint, 'checkpoint')
    if args.out is not None:
        cli.require_writable(os.path.dirname(args.out) or '.', 'folder', '--out')
    require_datasets(config, ('test_dataloader',))
    config.load_from, config.resume = args.checkpoint, False
    cli.shorten_report(config)

    if args.show or args.show_dir:
        config = trigger_visualization_hook(config, args)
    if args.tta:
        use_tta(config)

    if args.onnx is not None:
        cli.require_packages('onnxruntime')
        cli.require_file(args.onnx, 'ONNX file')
    if args.fuse_conv_bn or args.collapse_static or args.onnx:
        drop_ema(config)
    runner = cli.build_runner(config)
    with cli.config_errors_as_exit(config):
        require_fit(runner, args.checkpoint)
    if args.fuse_conv_bn or args.collapse_static:
        runner.load_or_resume()  # what is folded is the checkpoint's
        runner.model.eval()
    if args.collapse_static:
        cli.collapse_static(runner.model, config, args.collapse_static)
    if args.fuse_conv_bn:
        prepare_for_inference(runner.model)
    if args.onnx is not None:
        try:
            use_onnx_network(detector_of(runner.model), args.onnx)
        except ValueError as error:
            raise SystemExit(str(error)) from error
    if args.out is not None:
        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
    with cli.config_errors_as_exit(config):
        runner.test()


if __name__ == '__main__':
    main()
