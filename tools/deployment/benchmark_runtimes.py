#!/usr/bin/env python
"""Times networks with random weights in PyTorch, ONNX Runtime and OpenVINO, side by side on a CPU.

Backbones alone, and YOLOX-tiny and RTMDet-tiny up to their boxes; each plain and with ODConv, K = 1
and 4. All that is timed takes turns in one process. At each turn a network runs twice and the
second run counts. The figures are medians, and their ratios to the plain network's are what to
compare. With --write-only the files are written and nothing is timed.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.models.backbones import MobileNetV2, ResNet
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from mmdet_odconv import (
    ODMobileNetV2,
    ODResNet,
    cli,
    prepare_for_export,
    prepare_for_inference,
)
from mmdet_odconv.deployment import Detections, export_detector

BACKBONES: dict[str, tuple[type[nn.Module], type[nn.Module], dict[str, Any]]] = {
    'ResNet-18': (ResNet, ODResNet, dict(depth=18)),
    'ResNet-50': (ResNet, ODResNet, dict(depth=50)),
    'MobileNetV2': (MobileNetV2, ODMobileNetV2, {}),
}
DETECTORS = {
    'YOLOX-tiny': 'yolox_od_cspdarknet-tiny.py',
    'RTMDet-tiny': 'rtmdet_od_cspnext-tiny.py',
}
RUNTIMES = ('eager', 'compiled', 'onnxruntime', 'openvino')
CONFIGS = Path(__file__).parents[2] / 'configs/odconv'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*BACKBONES, *DETECTORS]
    parser.add_argument('--networks', nargs='+', choices=names, default=names)
    parser.add_argument('--kernel-nums', nargs='+', type=cli.positive, default=[1, 4])
    parser.add_argument('--runtimes', nargs='+', choices=RUNTIMES, default=RUNTIMES)
    parser.add_argument('--size', type=cli.positive, default=640, help='side of the image')
    parser.add_argument('--threads', type=cli.positive, default=1)
    parser.add_argument('--rounds', type=cli.positive, default=5)
    parser.add_argument('--folder', type=Path, default=Path('work_dirs/runtimes'))
    parser.add_argument('--write-only', action='store_true', help='write the ONNX files only')
    return parser.parse_args()


def network(name: str, kernel_num: int | None) -> nn.Module:
    """A backbone or a detector; plain where ``kernel_num`` is None."""
    torch.manual_seed(0)
    if name in BACKBONES:
        plain, dynamic, options = BACKBONES[name]
        options = options if kernel_num is None else dict(options, kernel_num=kernel_num)
        model = (plain if kernel_num is None else dynamic)(**options)
        model.eval()
        return prepare_for_inference(model)
    config = Config.fromfile(CONFIGS / DETECTORS[name]).model
    config.backbone.init_cfg = None
    if kernel_num is None:
        config.type = config.pop('detector')
        config.pop('odconv')
    else:
        config.odconv.kernel_num = kernel_num
    return MODELS.build(config)


def inputs_of(name: str, size: int) -> dict[str, torch.Tensor]:
    image = torch.randn(1, 3, size, size)
    if name in BACKBONES:
        return dict(image=image)
    return dict(image=image, size=torch.full((1, 2), float(size)), scale=torch.ones(1, 2))


def write(name: str, model: nn.Module, path: Path, size: int) -> None:
    """The ONNX file for images of one size, unless it is there."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if name in DETECTORS:
        export_detector(model, path, (size, size), free_size=False)
        return
    model = prepare_for_export(copy.deepcopy(model))
    with torch.no_grad():
        exported = torch.export.export(model, (inputs_of(name, size)['image'],), strict=False)
    program = torch.onnx.export(exported, dynamo=True, input_names=['image'], verbose=False)
    assert program is not None
    program.save(path)


def runner(
    runtime: str, model: nn.Module, path: Path, inputs: dict[str, torch.Tensor], threads: int
) -> Callable[[], Any]:
    arrays = {key: value.numpy() for key, value in inputs.items()}
    if runtime == 'onnxruntime':
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
        return lambda: session.run(None, arrays)
    if runtime == 'openvino':
        import openvino

        config = dict(INFERENCE_NUM_THREADS=threads, INFERENCE_PRECISION_HINT='f32')
        compiled = openvino.Core().compile_model(
            path, 'CPU', config | dict(PERFORMANCE_HINT='LATENCY')
        )
        return lambda: compiled(arrays)
    called = torch.compile(model) if runtime == 'compiled' else model
    return lambda: called(*inputs.values())


@torch.no_grad()
def main() -> None:
    args = parse_args()
    cli.require_packages('onnx', 'onnxruntime', 'onnxscript')
    init_default_scope('mmdet')
    torch.set_num_threads(args.threads)
    for name in args.networks:
        runs: dict[tuple[str, str], Callable[[], Any]] = {}
        for kernel_num in (None, *args.kernel_nums):
            variant = 'plain' if kernel_num is None else f'K={kernel_num}'
            model = network(name, kernel_num)
            path = args.folder / f'{name}_{variant}_{args.size}.onnx'
            write(name, model, path, args.size)
            if args.write_only:
                continue
            model = Detections(model) if name in DETECTORS else model
            inputs = inputs_of(name, args.size)
            for runtime in args.runtimes:
                runs[runtime, variant] = runner(runtime, model, path, inputs, args.threads)
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
        for run in runs.values():  # compiles
            run()
        for _ in range(args.rounds):
            for key, run in runs.items():
                run()
                start = time.perf_counter()
                run()
                seconds[key].append(time.perf_counter() - start)
        for (runtime, variant), values in seconds.items():
            plain = np.array(seconds[runtime, 'plain'])
            row = dict(
                network=name, size=args.size, threads=args.threads, runtime=runtime,
                variant=variant, ms=round(1e3 * statistics.median(values), 1),
                ratio=round(float(np.median(np.array(values) / plain)), 2),
            )  # fmt: skip
            print(json.dumps(row), flush=True)


if __name__ == '__main__':
    main()
