"""``conv_cfg=dict(type='ODConv')`` in the modules of mmdet that take a ``conv_cfg``."""

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules

from mmdet_odconv import ODConv2d

CONV = dict(type='ODConv', kernel_num=2)
NORM = dict(type='BN')
LEVELS = [(8, 16), (16, 8), (32, 4)]
WIDTHS = [width for width, _ in LEVELS]
CSP = dict(in_channels=WIDTHS, out_channels=8)

BACKBONES = {
    'ResNet': dict(depth=18, base_channels=8),
    'ResNeXt': dict(depth=50, groups=4, base_width=4),
    'MobileNetV2': dict(widen_factor=0.25),
    'Darknet': dict(),
    'CSPDarknet': dict(widen_factor=0.125),
    'CSPNeXt': dict(widen_factor=0.125),
}
NECKS = {
    'FPN': dict(in_channels=WIDTHS, out_channels=8, num_outs=4),
    'PAFPN': dict(in_channels=WIDTHS, out_channels=8, num_outs=3),
    'BFP': dict(in_channels=8, num_levels=3, refine_type='conv'),
    'ChannelMapper': dict(
        in_channels=WIDTHS, out_channels=8, norm_cfg=dict(type='GN', num_groups=2)
    ),
    'YOLOXPAFPN': dict(CSP, num_csp_blocks=1),
    'CSPNeXtPAFPN': dict(CSP, num_csp_blocks=1),
}
HEADS = {
    'RetinaHead': dict(stacked_convs=2),
    'ATSSHead': dict(stacked_convs=2, norm_cfg=NORM),
    'FCOSHead': dict(stacked_convs=2, norm_cfg=NORM),
    'YOLOXHead': dict(stacked_convs=2),
    'RTMDetSepBNHead': dict(stacked_convs=2, norm_cfg=NORM),
}


@pytest.fixture(autouse=True)
def _scope():
    register_all_modules()


def check(module, inputs):
    """Forward and backward; every ODConv layer's bank gets a gradient."""
    module.init_weights()
    module.train()
    layers = [m for m in module.modules() if isinstance(m, ODConv2d)]
    assert layers
    assert {layer.kernel_num for layer in layers} == {2}
    outputs = list(tensors(module(inputs)))
    sum(output.square().sum() for output in outputs).backward()
    assert all(output.isfinite().all() for output in outputs)
    assert all(layer.weight.grad.isfinite().all() for layer in layers)


def tensors(outputs):
    if isinstance(outputs, torch.Tensor):
        yield outputs
    else:
        for output in outputs:
            yield from tensors(output)


@pytest.mark.parametrize('name', BACKBONES)
def test_backbones(name):
    options = BACKBONES[name]
    stages = {'ResNet': (3,), 'ResNeXt': (3,), 'MobileNetV2': (7,), 'Darknet': (5,)}
    backbone = MODELS.build(
        dict(type=name, conv_cfg=CONV, out_indices=stages.get(name, (4,)), **options)
    )
    check(backbone, torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize('name', NECKS)
def test_necks(name):
    neck = MODELS.build(dict(type=name, conv_cfg=CONV, **NECKS[name]))
    widths = [8] * 3 if name == 'BFP' else WIDTHS
    sizes = [size for _, size in LEVELS]
    inputs = [torch.randn(2, w, size, size) for w, size in zip(widths, sizes, strict=True)]
    check(neck, tuple(inputs))


@pytest.mark.parametrize('name', HEADS)
def test_heads(name):
    head = MODELS.build(
        dict(
            type=name,
            num_classes=3,
            in_channels=8,
            feat_channels=8,
            conv_cfg=CONV,
            **HEADS[name],
        )
    )
    levels = len(getattr(head, 'strides', None) or head.prior_generator.strides)
    check(head, [torch.randn(2, 8, 16 >> i, 16 >> i) for i in range(levels)])
