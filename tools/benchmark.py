"""Times ODConv against the plain convolutions that it replaces, side by side in one process.

Each row is a process of its own: what one leaves in the allocator would change the next. In it,
networks take turns within each round, after a round that does not count. At each turn a network
runs at least twice and the last run counts: the first finds caches and memory as another one left
them. The figures are medians, and their ratios to the plain network's are what to compare.

    python tools/benchmark.py --table               # backbones, against the targets
    python tools/benchmark.py --compiled            # the same under torch.compile, plain and ODConv
    python tools/benchmark.py --detectors           # whole detectors
    python tools/benchmark.py --layers              # the layers of ResNet-50, one by one
    python tools/benchmark.py --growth              # over K, batch and image side
    python tools/benchmark.py --peers               # CondConv2d beside timm's, layer by layer
    python tools/benchmark.py --fdconv              # FDConv2d beside ODConv2d, layer by layer
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmdet.models import BaseDetector
from mmdet.models.backbones import MobileNetV2, ResNet
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mmdet_odconv import CondConv2d, FDConv2d, ODConv2d, ODMobileNetV2, ODResNet, cli
from mmdet_odconv.functional import Attentions, record_strategies

VARIANTS = ('plain', 'published', 'ours')
BACKBONES: dict[str, tuple[type[nn.Module], type[nn.Module], dict[str, Any]]] = {
    'ResNet-50': (ResNet, ODResNet, dict(depth=50, norm_eval=False)),
    'MobileNetV2': (MobileNetV2, ODMobileNetV2, {}),
}
CONFIGS = Path(__file__).parents[1] / 'configs/odconv'
DETECTORS = {
    'RetinaNet ResNet-50': 'retinanet_od_r50.py',
    'Faster R-CNN ResNet-50': 'faster-rcnn_od_r50.py',
    'RetinaNet MobileNetV2': 'retinanet_od_mobilenetv2.py',
    'YOLOX-tiny': 'yolox_od_cspdarknet-tiny.py',
}


# For glibc, which else returns large buffers to the system and fetches new pages at each use.
KEEP_MEMORY = {'MALLOC_MMAP_THRESHOLD_': str(1 << 30), 'MALLOC_TRIM_THRESHOLD_': str(1 << 34)}


class Case(NamedTuple):
    """One row of a table: a task, its size, and the ratio to reach."""

    task: str
    network: str
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
    Case('peak memory', 'ResNet-50', 2, 640, 4),
    Case('peak memory', 'ResNet-50', 8, 224, 4),
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
    Case('inference', 'MobileNetV2', 1, 224, 4),
    Case('training', 'MobileNetV2', 8, 224, 4, 1.60),
)
COMPILED = tuple(
    Case(task, network, batch, 224, 4)
    for network in ('ResNet-50', 'MobileNetV2')
    for task, batch in (('inference', 1), ('inference', 8), ('training', 8), ('saved bytes', 8))
)
GROWTH = (
    *(Case('inference', 'ResNet-50', 2, 224, k) for k in (1, 2, 4, 8, 16)),
    *(Case('inference', 'ResNet-50', b, 224, 4) for b in (1, 2, 4, 8, 16, 32)),
    *(Case('inference', 'ResNet-50', 1, side, 4) for side in (224, 384, 512, 640, 800, 1024)),
    *(Case('training', 'ResNet-50', 2, 224, k) for k in (1, 2, 4, 8, 16)),
)
WHOLE = tuple(
    Case(task, network, batch, 640, 4)
    for network in DETECTORS
    for task, batch in (('inference', 1), ('training', 2), ('peak memory', 2))
)


def published_formula(
    x: Tensor, bank: Tensor, attentions: Attentions, stride: Any, padding: Any, groups: int
) -> Tensor:
    """Equation 3 of the paper, term by term: every kernel of the bank scaled for every sample."""
    batch = x.shape[0]
    channel, filter_, spatial, kernel = attentions
    if channel is not None:
        x = x * channel[:, :, None, None]
    x = x.reshape(1, -1, *x.shape[2:])
    weights = bank.unsqueeze(0)
    if spatial is not None:
        weights = weights * spatial.reshape(batch, 1, 1, 1, *bank.shape[3:])
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
    cases = {
        'table': TABLE,
        'compiled': COMPILED,
        'detectors': WHOLE,
        'growth': GROWTH,
        'layers': layer_grid(),
        'peers': peer_grid(),
        'fdconv': fdconv_grid(),
    }
    results = []
    for case in cases[args.what]:
        single = isinstance(
            case, LayerCase | PeerCase
        )  # Too small to change the next one's memory.
        results.append(row(case, args) if single else in_new_process(row, case, args))
        console.print(' '.join(map(shown, results[-1].values())), highlight=False)
    table = Table(*results[0])
    for result in results:
        table.add_row(*map(shown, result.values()))
    console.print(table)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        report = {
            'processor': processor(args.device),
            'torch': torch.__version__,
            'keep_memory': args.keep_memory,
        }
        args.out.write_text(json.dumps(report | {'results': results}, indent=1), encoding='utf-8')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    for name, text in {
        'table': 'backbones, against the targets',
        'compiled': 'backbones under torch.compile, without the published formula',
        'detectors': 'whole detectors',
        'layers': 'the layers of ResNet-50',
        'growth': 'over K, batch and image side',
        'peers': "CondConv2d beside timm's (pip install timm)",
        'fdconv': 'FDConv2d and ODConv2d beside plain convolutions',
    }.items():
        what.add_argument(f'--{name}', dest='what', action='store_const', const=name, help=text)
    parser.add_argument('--device', default='cpu', help='device (default: cpu)')
    parser.add_argument(
        '--rounds', type=cli.positive, default=7, help='rounds that count (default: 7)'
    )
    parser.add_argument(
        '--strategy', default='auto', help="strategy of the layers (default: 'auto')"
    )
    parser.add_argument('--out', type=Path, help='JSON file to write')
    parser.add_argument(
        '--without-published',
        action='store_true',
        help='leave out the published formula, which takes most of the time',
    )
    parser.add_argument(
        '--keep-memory',
        action='store_true',
        help='let the C library (glibc) keep what is freed, as other allocators do',
    )
    args = parser.parse_args()
    if args.what == 'peers':
        cli.require_packages('timm', install='timm')
    if torch.device(args.device).type == 'cuda' and not torch.cuda.is_available():
        parser.error(f'--device {args.device}: PyTorch sees no GPU')
    # The formula has no place in the comparison of compiled networks.
    args.without_published |= args.what == 'compiled'
    if args.keep_memory:
        os.environ |= KEEP_MEMORY
    return args


def shown(value: Any) -> str:
    return f'{value:.3f}' if isinstance(value, float) else '' if value is None else str(value)


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def row(case: 'Case | LayerCase | PeerCase', args: argparse.Namespace) -> dict[str, Any]:
    """Ratios of the published formula and of this package to plain."""
    if isinstance(case, PeerCase):
        return peer_row(case, args)
    if isinstance(case, LayerCase):
        return fdconv_row(case, args) if args.what == 'fdconv' else layer_row(case, args)
    if case.task == 'peak memory':
        values = {variant: peak_memory(case, variant, args) for variant in variants(args)}
    else:
        x = image(case, args.device)
        networks = {variant: build(case, variant, args) for variant in variants(args)}
        if case.task == 'saved bytes':
            values = {name: float(saved_bytes(network, x)) for name, network in networks.items()}
        else:
            step = infer if case.task == 'inference' else train
            values = medians({name: partial(step, n, x) for name, n in networks.items()}, args)
    return {
        'task': case.task,
        'network': case.network,
        'input': f'{case.batch}×3×{case.side}×{case.side}',
        'K': case.kernel_num,
        **ratios(values),
        'target': case.target,
    }


def variants(args: argparse.Namespace) -> list[str]:
    return [v for v in VARIANTS if v != 'published' or not args.without_published]


def ratios(values: dict[str, float]) -> dict[str, float]:
    """Plain in seconds or bytes, and the others in units of it."""
    plain = values.pop('plain')
    return {'plain': plain} | {f'{name} / plain': value / plain for name, value in values.items()}


def build(case: Case, variant: str, args: argparse.Namespace) -> nn.Module:
    """The network of ``case`` as one of ``VARIANTS``, in the mode that its task needs."""
    odconv = dict(kernel_num=case.kernel_num, odconv_cfg=dict(strategy=args.strategy))
    torch.manual_seed(0)
    if case.network in BACKBONES:
        plain, dynamic, options = BACKBONES[case.network]
        network = plain(**options) if variant == 'plain' else dynamic(**options, **odconv)
    else:
        config = Config.fromfile(CONFIGS / DETECTORS[case.network])
        init_default_scope('mmdet')
        model, backbone = config.model, config.model.backbone
        if model.type == 'ODConvModel':
            model.odconv.update(kernel_num=case.kernel_num, strategy=args.strategy)
            if variant == 'plain':
                model.type = model.pop('detector')
                model.pop('odconv')
        elif variant == 'plain':
            backbone.type = backbone.type.removeprefix('OD')
            for name in ('kernel_num', 'odconv_cfg'):
                backbone.pop(name, None)
        else:
            backbone.kernel_num = case.kernel_num
            backbone.setdefault('odconv_cfg', {})['strategy'] = args.strategy
        network = MODELS.build(model)
    if variant == 'published':
        for module in network.modules():
            if type(module) is ODConv2d:
                module.__class__ = PublishedODConv2d
    network.to(args.device).train(case.task != 'inference')
    return torch.compile(network) if args.what == 'compiled' else network


def image(case: Case, device: str) -> Tensor:
    return torch.randn(case.batch, 3, case.side, case.side, device=device)


class LayerCase(NamedTuple):
    """A convolution of ResNet-50 at 224², and what is done with it."""

    task: str
    in_channels: int
    out_channels: int
    kernel_size: int
    side: int
    batch: int
    kernel_num: int


def layer_grid() -> list[LayerCase]:
    """One of each kind of layer in each stage, by task, K and batch."""
    stages = ((64, 56), (128, 28), (256, 14), (512, 7))
    return [
        LayerCase(task, *layer, side, batch, kernel_num)
        for task, kernel_num, batch in itertools.product(('inference', 'training'), (1, 4), (1, 8))
        for width, side in stages
        for layer in ((4 * width, width, 1), (width, width, 3), (width, 4 * width, 1))
    ]


def fdconv_grid() -> list[LayerCase]:
    """Layers of ResNet-50, with two images and FDConv's published K."""
    layers = ((64, 64, 3, 56), (256, 256, 3, 14), (512, 512, 3, 7), (256, 1024, 1, 14))
    return [LayerCase('training', *layer, 2, 64) for layer in layers]


class PeerCase(NamedTuple):
    """A CondConv layer of both libraries, and what is done with it."""

    task: str
    channels: int
    kernel_size: int
    side: int
    batch: int
    kernel_num: int = 8


def peer_grid() -> list[PeerCase]:
    """Layers on maps of 7² to 56², and a small one on a single map, by task and batch."""
    sizes = ((64, 3, 56), (128, 3, 28), (256, 1, 14), (256, 3, 14), (512, 3, 7))
    tasks = ('inference', 'training')
    grid = [PeerCase(task, *size, batch) for task in tasks for size in sizes for batch in (1, 8)]
    return [*grid, *(PeerCase(task, 32, 3, 20, 1) for task in tasks)]


def peer_row(case: PeerCase, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of timm's layer, and ours in units of it; both with the same routing weights."""
    from timm.layers import CondConv2d as TimmCondConv2d

    task, channels, size, side, batch, kernel_num = case
    training = task == 'training'
    theirs = TimmCondConv2d(channels, channels, size, padding=size // 2, num_experts=kernel_num).to(
        args.device
    )
    ours = CondConv2d(
        channels, channels, size, padding=size // 2, bias=False, kernel_num=kernel_num
    ).to(args.device)
    routing = nn.Linear(channels, kernel_num).to(args.device)

    def with_routing(x: Tensor) -> Tensor:
        # timm's layer is given the weights that ours computes itself.
        return theirs(x, torch.sigmoid(routing(x.mean((2, 3)))))

    x = torch.randn(batch, channels, side, side, device=args.device, requires_grad=training)
    parameters = {
        'plain': (*theirs.parameters(), *routing.parameters()),
        'ours': tuple(ours.parameters()),
    }

    def step(name: str, forward: Callable[[Tensor], Tensor]) -> None:
        if not training:
            with torch.inference_mode():
                forward(x)
            return
        for parameter in (x, *parameters[name]):
            parameter.grad = None
        forward(x).mean().backward()

    runs = {'plain': partial(step, 'plain', with_routing), 'ours': partial(step, 'ours', ours)}
    seconds = medians(runs, args)
    return {
        'task': task,
        'layer': f'{channels}→{channels} {size}×{size} at {side}×{side}',
        'batch': batch,
        'K': kernel_num,
        'timm': seconds['plain'],
        'ours / timm': seconds['ours'] / seconds['plain'],
    }


def layer_row(case: LayerCase, args: argparse.Namespace) -> dict[str, Any]:
    c_in, c_out, size, side = case[1:5]
    conv = partial(nn.Conv2d, c_in, c_out, size, padding=size // 2, bias=False)
    odconv = dict(padding=size // 2, bias=False, kernel_num=case.kernel_num)
    networks = {
        'plain': conv(),
        'published': PublishedODConv2d(c_in, c_out, size, **odconv),
        'ours': ODConv2d(c_in, c_out, size, strategy=args.strategy, **odconv),
    }
    if args.without_published:
        del networks['published']
    training = case.task == 'training'
    x = torch.randn(case.batch, c_in, side, side, device=args.device, requires_grad=training)
    for network in networks.values():
        network.to(args.device).train(training)
    step = train if training else infer
    with record_strategies() as choices:
        step(networks['ours'], x)
    return {
        'task': case.task,
        'layer': f'{c_in}→{c_out} {size}×{size} at {side}×{side}',
        'batch': case.batch,
        'K': case.kernel_num,
        'strategy': choices[0].strategy,
        **ratios(medians({name: partial(step, n, x) for name, n in networks.items()}, args)),
    }


def fdconv_row(case: LayerCase, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a training step, and bytes that are kept for the backward pass."""
    _, c_in, c_out, size, side, batch, kernel_num = case
    options: dict[str, Any] = dict(padding=size // 2, bias=False)
    dynamic = options | dict(norm_cfg=dict(type='LN'))
    networks = {
        'plain': nn.Conv2d(c_in, c_out, size, **options),
        'ODConv': ODConv2d(c_in, c_out, size, kernel_num=4, **dynamic),
        'FDConv': FDConv2d(c_in, c_out, size, kernel_num=kernel_num, **dynamic),
    }
    x = torch.randn(batch, c_in, side, side, device=args.device, requires_grad=True)
    for network in networks.values():
        network.to(args.device)
    seconds = medians({name: partial(train, n, x) for name, n in networks.items()}, args)
    return {
        'layer': f'{c_in}→{c_out} {size}×{size} at {side}×{side}',
        'batch': batch,
        **ratios(seconds),
        **{f'{name} MB': saved_bytes(n, x) / 1e6 for name, n in networks.items()},
    }


def infer(network: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        if isinstance(network, BaseDetector):
            network.predict(x, samples(x), rescale=False)
        else:
            network(x)


def train(network: nn.Module, x: Tensor) -> None:
    """Forward and backward; gradients are made anew, as ``zero_grad()`` has it."""
    for parameter in network.parameters():
        parameter.grad = None
    x.grad = None
    if isinstance(network, BaseDetector):
        loss = network.parse_losses(network.loss(x, samples(x)))[0]
    else:
        outputs = network(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum((y.mean() for y in outputs), torch.zeros((), device=x.device))
    loss.backward()


def samples(x: Tensor) -> list[DetDataSample]:
    """What a detector must know of each image of ``x``: its size, and for training eight boxes."""
    size = tuple(x.shape[2:])
    corners = torch.arange(8, device=x.device)[:, None] * size[0] / 16.0
    boxes = torch.cat([corners, corners, corners + size[0] / 4, corners + size[0] / 4], 1)
    sample = DetDataSample(
        metainfo=dict(
            img_shape=size,
            ori_shape=size,
            pad_shape=size,
            batch_input_shape=size,
            scale_factor=(1, 1),
        ),
        gt_instances=InstanceData(bboxes=boxes, labels=torch.arange(8, device=x.device)),
    )
    return [sample] * len(x)


def medians(runs: dict[str, Callable[[], None]], args: argparse.Namespace) -> dict[str, float]:
    """Seconds of each run, the runs taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds + 1):
        for name, run in runs.items():
            warm = time.perf_counter() + 0.2
            run()
            while time.perf_counter() < warm:
                run()
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


def peak_memory(case: Case, variant: str, args: argparse.Namespace) -> float:
    """Bytes that a training step takes at most, beyond the network and its input."""
    if torch.device(args.device).type == 'cuda':
        network, x = build(case, variant, args), image(case, args.device)
        torch.cuda.reset_peak_memory_stats(args.device)
        before = torch.cuda.memory_allocated(args.device)
        train(network, x)
        return float(torch.cuda.max_memory_allocated(args.device) - before)
    # The peak of a process never falls: each network needs a new one.
    return in_new_process(peak_of_this_process, case, variant, args)


def peak_of_this_process(case: Case, variant: str, args: argparse.Namespace) -> float:
    network, x = build(case, variant, args), image(case, args.device)
    before = peak_resident()
    train(network, x)
    return peak_resident() - before


def peak_resident() -> float:
    """Bytes of memory that this process has held at most."""
    status = Path('/proc/self/status')
    if status.exists():
        # getrusage's figure would include that of the process that started this one.
        found = re.search(r'VmHWM:\s*(\d+) kB', status.read_text(encoding='utf-8'))
        if found:
            return float(found[1]) * 1024
    unit = 1 if sys.platform == 'darwin' else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


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
        for line in (info.read_text(encoding='utf-8').splitlines() if info.exists() else [])
        if line.startswith('model name')
    ]
    name = names[0] if names else platform.processor()
    return f'{name}, {torch.get_num_threads()} threads'


if __name__ == '__main__':
    main()
