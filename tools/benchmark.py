"""Times ODConv against the plain convolutions that it replaces, side by side in one process.

Networks take turns within each round, after a round that does not count; the figures are medians,
and their ratios to the plain network's are what to compare.

    python tools/benchmark.py --table               # backbones, against the targets
    python tools/benchmark.py --layers              # the layers of ResNet-50, one by one
    python tools/benchmark.py --growth              # over K, batch and image side
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmdet.models.backbones import MobileNetV2, ResNet
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mmdet_odconv import ODConv2d, ODMobileNetV2, ODResNet
from mmdet_odconv.functional import Attentions

BACKBONES: dict[str, tuple[type[nn.Module], type[nn.Module], dict[str, Any]]] = {
    'ResNet-50': (ResNet, ODResNet, dict(depth=50, norm_eval=False)),
    'MobileNetV2': (MobileNetV2, ODMobileNetV2, {}),
}


class Case(NamedTuple):
    """One row of the table: a task, its size, and the ratio to reach."""

    task: str
    backbone: str
    batch: int
    side: int
    kernel_num: int
    target: float | None = None


TABLE = (
    Case('inference', 'ResNet-50', 1, 640, 4, 1.06),
    Case('inference', 'ResNet-50', 2, 640, 4, 1.06),
    Case('inference', 'ResNet-50', 1, 224, 4, 1.40),
    Case('inference', 'ResNet-50', 8, 224, 4, 1.20),
    Case('training', 'ResNet-50', 8, 224, 4, 1.30),
    Case('training', 'ResNet-50', 2, 640, 4, 1.06),
    Case('saved bytes', 'ResNet-50', 2, 640, 4, 1.03),
    Case('saved bytes', 'ResNet-50', 8, 224, 4, 1.03),
    Case('inference', 'ResNet-50', 1, 640, 1, 1.05),
    Case('inference', 'ResNet-50', 2, 640, 1, 1.05),
    Case('inference', 'ResNet-50', 1, 224, 1, 1.15),
    Case('inference', 'ResNet-50', 8, 224, 1, 1.12),
    Case('training', 'ResNet-50', 8, 224, 1, 1.15),
    Case('training', 'ResNet-50', 2, 640, 1, 1.06),
    Case('saved bytes', 'ResNet-50', 2, 640, 1, 1.03),
    Case('saved bytes', 'ResNet-50', 8, 224, 1, 1.03),
    Case('inference', 'MobileNetV2', 8, 224, 4, 1.35),
    Case('inference', 'MobileNetV2', 1, 640, 4, 1.15),
    Case('training', 'MobileNetV2', 8, 224, 4, 1.60),
)
GROWTH = (
    *(Case('inference', 'ResNet-50', 2, 224, k) for k in (1, 2, 4, 8, 16)),
    *(Case('inference', 'ResNet-50', b, 224, 4) for b in (1, 4, 8, 16, 32)),
    *(Case('inference', 'ResNet-50', 1, side, 4) for side in (224, 384, 512, 640, 800, 1024)),
)


def published_formula(
    x: Tensor, bank: Tensor, attentions: Attentions, stride: Any, padding: Any, groups: int
) -> Tensor:
    """Equation 3 of the paper, term by term: every kernel of the bank scaled for every sample."""
    batch = x.shape[0]
    channel, filter_, spatial, kernel = attentions
    x = (x * channel[:, :, None, None]).reshape(1, -1, *x.shape[2:])
    weights = bank.unsqueeze(0)
    if spatial is not None:
        weights = weights * spatial.view(batch, 1, 1, 1, *bank.shape[3:])
    if kernel is not None:
        weights = weights * kernel.view(batch, -1, 1, 1, 1, 1)
    weights = weights.expand(batch, *weights.shape[1:]).sum(1).flatten(0, 1)
    y = nn.functional.conv2d(x, weights, None, stride, padding, 1, batch * groups)
    y = y.view(batch, -1, *y.shape[2:])
    return y if filter_ is None else y * filter_[:, :, None, None]


class PublishedODConv2d(ODConv2d):
    """The layer as published, for comparison."""

    def forward(self, x: Tensor) -> Tensor:
        return published_formula(
            x, self.weight, self.attention(x), self.stride, self.padding, self.groups
        )


def main() -> None:
    args = parse_args()
    console = Console()
    console.print(f'{processor(args.device)}, torch {torch.__version__}')
    if args.layers:
        results = [layer_result(case, args) for case in resnet50_layers()]
    else:
        cases = GROWTH if args.growth else TABLE
        results = []
        for case in cases:
            results.append(backbone_result(case, args))
            console.print(results[-1])
    table = Table(*results[0])
    for result in results:
        table.add_row(*(f'{v:.3f}' if isinstance(v, float) else str(v) for v in result.values()))
    console.print(table)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        report = {'processor': processor(args.device), 'torch': torch.__version__}
        args.out.write_text(json.dumps(report | {'results': results}, indent=1))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--table', action='store_true', help='backbones, against the targets')
    what.add_argument('--layers', action='store_true', help='the layers of ResNet-50')
    what.add_argument('--growth', action='store_true', help='over K, batch and image side')
    parser.add_argument('--device', default='cpu', help='device (default: cpu)')
    parser.add_argument('--rounds', type=int, default=7, help='rounds that count (default: 7)')
    parser.add_argument(
        '--strategy', default='auto', help="strategy of the layers (default: 'auto')"
    )
    parser.add_argument('--out', type=Path, help='JSON file to write')
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f'--rounds must be at least 1, got {args.rounds}')
    return args


def backbone_result(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """A backbone's row: ratios of the published formula and of this package to plain."""
    plain_type, dynamic_type, options = BACKBONES[case.backbone]
    torch.manual_seed(0)
    published = dynamic_type(kernel_num=case.kernel_num, **options)
    for module in published.modules():
        if type(module) is ODConv2d:
            module.__class__ = PublishedODConv2d
    ours = dynamic_type(
        kernel_num=case.kernel_num, odconv_cfg=dict(strategy=args.strategy), **options
    )
    networks = {'plain': plain_type(**options), 'published': published, 'ours': ours}
    for network in networks.values():
        network.to(args.device).train(case.task != 'inference')
    x = torch.randn(case.batch, 3, case.side, case.side, device=args.device)
    if case.task == 'saved bytes':
        values = {name: float(saved_bytes(network, x)) for name, network in networks.items()}
    else:
        step = infer if case.task == 'inference' else train
        values = medians(
            {name: lambda network=n: step(network, x) for name, n in networks.items()}, args
        )
    return {
        'task': case.task,
        'backbone': case.backbone,
        'input': f'{case.batch}×3×{case.side}×{case.side}',
        'K': case.kernel_num,
        'plain': values['plain'],
        'published / plain': values['published'] / values['plain'],
        'ours / plain': values['ours'] / values['plain'],
        'target': case.target,
    }


class Layer(NamedTuple):
    """A convolution of ResNet-50 at 224²."""

    in_channels: int
    out_channels: int
    kernel_size: int
    side: int


def resnet50_layers() -> list[Layer]:
    """One of each kind of layer in each stage."""
    layers = []
    for width, side in ((64, 56), (128, 28), (256, 14), (512, 7)):
        layers.append(Layer(4 * width, width, 1, side))
        layers.append(Layer(width, width, 3, side))
        layers.append(Layer(width, 4 * width, 1, side))
    return layers


def layer_result(layer: Layer, args: argparse.Namespace, batch: int = 8) -> dict[str, Any]:
    """A layer's row: a training step at K = 4, batch 8."""
    c_in, c_out, size, side = layer
    networks = {
        'plain': nn.Conv2d(c_in, c_out, size, padding=size // 2, bias=False),
        'published': PublishedODConv2d(c_in, c_out, size, padding=size // 2, bias=False),
        'ours': ODConv2d(c_in, c_out, size, padding=size // 2, bias=False, strategy=args.strategy),
    }
    x = torch.randn(batch, c_in, side, side, device=args.device, requires_grad=True)
    for network in networks.values():
        network.to(args.device)
    values = medians({n: lambda network=m: train(network, x) for n, m in networks.items()}, args)
    return {
        'layer': f'{c_in}→{c_out} {size}×{size} at {side}×{side}',
        'plain': values['plain'],
        'published / plain': values['published'] / values['plain'],
        'ours / plain': values['ours'] / values['plain'],
    }


def infer(network: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        network(x)


def train(network: nn.Module, x: Tensor) -> None:
    """Forward and backward; gradients are made anew, as ``zero_grad()`` has it."""
    for parameter in network.parameters():
        parameter.grad = None
    x.grad = None
    outputs = network(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward([y.mean() for y in outputs])


def medians(runs: dict[str, Callable[[], None]], args: argparse.Namespace) -> dict[str, float]:
    """Seconds of each run, the runs taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds + 1):
        for name, run in runs.items():
            wait(args.device)
            start = time.perf_counter()
            run()
            wait(args.device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def saved_bytes(network: nn.Module, x: Tensor) -> int:
    """Bytes of the storages that autograd keeps for the backward pass, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        # The tensor itself would close a cycle with its own node, and never be freed.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # Held, and with it the graph, until the storages have been counted.
        outputs = network(x)
    total = sum(storage.nbytes() for storage in storages.values())
    del outputs
    return total


def wait(device: str) -> None:
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)


def processor(device: str) -> str:
    """What the figures were measured on."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_name(device)
    info = Path('/proc/cpuinfo')
    names = [
        line.partition(':')[2].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith('model name')
    ]
    name = names[0] if names else platform.processor()
    return f'{name}, {torch.get_num_threads()} threads'


if __name__ == '__main__':
    main()
