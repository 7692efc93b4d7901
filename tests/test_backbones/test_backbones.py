import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from mmdet_odconv import ODConv2d, ODMobileNetV2, ODResNet, ODResNetV1d, ODResNeXt
from mmdet_odconv.conversion.published import backbone_name
from tests.conftest import ROOT, load_cases
from tests.reference import fill, relative_error

DATA = ROOT / 'tests/data/backbones'


def build(args):
    """The backbone of a reference case; its ``width_mult`` is mmdet's ``widen_factor``."""
    args = dict(args)
    if 'width_mult' in args:
        widen_factor = args.pop('width_mult')
        return ODMobileNetV2(widen_factor=widen_factor, out_indices=(1, 2, 4, 7), **args)
    return ODResNet(**args)


@pytest.mark.parametrize('case', load_cases(DATA / 'cases.json'), ids=lambda c: c['name'])
def test_equals_the_published_implementation(case):
    model = build(case['args'])
    model.eval()
    state = {backbone_name(n): (n, tuple(shape)) for n, shape in case['state'].items()}
    state.pop(None)
    ours = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    temperatures = {n for n in ours if n.endswith('.attention.temperature')}
    assert len(temperatures) == sum(isinstance(m, ODConv2d) for m in model.modules())
    assert {n: shape for n, shape in ours.items() if n not in temperatures} == {
        n: shape for n, (_, shape) in state.items()
    }
    model.load_state_dict({n: torch.from_numpy(np.asarray(fill(*old))) for n, old in state.items()})
    x = np.random.default_rng(7).standard_normal(case['input_shape']).astype(np.float32)
    with torch.no_grad():
        outputs = model(torch.from_numpy(x))
    expected = np.load(DATA / f'{case["name"]}.npz')
    assert len(outputs) == len(expected)
    for i, output in enumerate(outputs):
        assert relative_error(output, expected[f'out{i}']) < 1e-4


def count(model, head_inputs):
    """Parameters in millions, the 1000-class head included."""
    backbone = sum(p.numel() for p in model.parameters())
    return (backbone + head_inputs * 1000 + 1000) / 1e6


@pytest.mark.parametrize('args', [dict(reduction=None), dict(odconv_cfg=dict(reduction=None))])
def test_no_reduction_means_no_squeeze_as_in_the_layer(args):
    model = ODMobileNetV2(widen_factor=0.25, **args)
    assert all(m.attention.fc is None for m in model.modules() if isinstance(m, ODConv2d))


@pytest.mark.parametrize(
    ('depth', 'kernel_num', 'expected'),
    [(18, 1, 11.94), (18, 4, 44.90), (50, 1, 28.64), (50, 4, 90.67), (101, 2, 90.44)],
)
def test_resnet_parameter_counts_are_the_papers(depth, kernel_num, expected):
    with torch.device('meta'):
        model = ODResNet(depth=depth, kernel_num=kernel_num)
    assert count(model, 512 if depth == 18 else 2048) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(
    ('width', 'kernel_num', 'expected'),
    [(1.0, 1, 4.94), (1.0, 4, 11.51), (0.5, 1, 2.43), (0.5, 4, 4.44)],
)
def test_mobilenet_parameter_counts_are_the_papers(width, kernel_num, expected):
    with torch.device('meta'):
        model = ODMobileNetV2(widen_factor=width, kernel_num=kernel_num)
    assert count(model, 1280) == pytest.approx(expected, abs=0.005)


def odconvs(model):
    return {name for name, m in model.named_modules() if isinstance(m, ODConv2d)}


def plain_convs(model):
    return {name for name, m in model.named_modules() if type(m) is nn.Conv2d}


SMALL = dict(base_channels=8, kernel_num=2)


def test_resnet_leaves_stem_and_shortcuts_plain():
    model = ODResNet(depth=50, **SMALL)
    assert plain_convs(model) == {'conv1'} | {f'layer{i}.0.downsample.0' for i in range(1, 5)}
    assert len(odconvs(model)) == 3 * (3 + 4 + 6 + 3)


def test_resnet_v1d_and_resnext():
    model = ODResNetV1d(depth=18, stem_channels=8, **SMALL)
    assert {name for name in plain_convs(model) if not name.startswith('stem.')} == {
        f'layer{i}.0.downsample.1' for i in range(2, 5)
    }
    model = ODResNeXt(depth=50, groups=4, base_width=4, **SMALL)
    assert model.layer1[0].conv2.groups == 4
    assert len(odconvs(model)) == 48
    assert [o.shape[1] for o in model(torch.randn(2, 3, 64, 64))] == [32, 64, 128, 256]


def test_mobilenet_leaves_only_the_first_convolution_plain():
    model = ODMobileNetV2(kernel_num=2, out_indices=(1, 2, 4, 7))
    assert plain_convs(model) == {'conv1.conv'}
    outputs = model(torch.randn(2, 3, 64, 64))
    assert [tuple(o.shape[1:]) for o in outputs] == [
        (24, 16, 16),
        (32, 8, 8),
        (96, 4, 4),
        (1280, 2, 2),
    ]


@pytest.mark.parametrize('name', ['ODResNet', 'ODResNetV1d', 'ODResNeXt', 'ODMobileNetV2'])
def test_builds_from_a_config_with_the_arguments_of_odconv(name):
    own = {} if name == 'ODMobileNetV2' else dict(depth=50, base_channels=8)
    model = MODELS.build(
        dict(
            type=name,
            kernel_num=3,
            reduction=0.25,
            temperature=5.0,
            odconv_cfg=dict(norm_cfg=dict(type='LN'), min_attention_channels=4),
            **own,
        )
    )
    layers = [m for m in model.modules() if isinstance(m, ODConv2d)]
    assert layers
    for layer in layers:
        assert layer.kernel_num == 3
        assert layer.temperature == 5.0
        assert isinstance(layer.attention.bn, nn.LayerNorm)
        assert layer.attention.fc.weight.shape[0] == max(int(layer.in_channels / 4), 4)


def test_frozen_stages_of_a_mobilenet_stay_plain():
    model = ODMobileNetV2(0.25, frozen_stages=2)
    plain = {
        name
        for name, child in model.named_children()
        if not any(isinstance(m, ODConv2d) for m in child.modules())
    }
    assert plain == {'conv1', 'layer1', 'layer2'}
    assert type(model.conv2.conv) is ODConv2d


def test_frozen_stages_and_norm_eval():
    model = ODResNet(depth=18, frozen_stages=2, norm_eval=True, **SMALL)
    model.train()
    assert not any(isinstance(m, ODConv2d) for m in model.layer2.modules())
    assert not any(p.requires_grad for p in model.layer2.parameters())
    assert all(p.requires_grad for p in model.layer3.parameters())
    assert not model.layer4[0].conv1.attention.bn.training
    model(torch.randn(2, 3, 32, 32))[-1].sum().backward()
    assert model.layer2[0].conv1.weight.grad is None
    assert model.layer3[0].conv1.weight.grad is not None


def test_deformable_convolutions_and_plugins_stay():
    model = ODResNet(
        depth=50,
        dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, False, False, True),
        plugins=[
            dict(cfg=dict(type='ContextBlock', ratio=1 / 4), position='after_conv3'),
        ],
        **SMALL,
    )
    names = odconvs(model)
    assert {'layer4.0.conv1', 'layer4.0.conv3', 'layer3.0.conv2'} <= names
    assert 'layer4.0.conv2' not in names
    assert type(model.layer4[0].conv2).__name__ == 'ModulatedDeformConv2dPack'
    assert not any('context_block' in name for name in names)


@pytest.mark.parametrize('style', ['pytorch', 'caffe'])
def test_the_strided_convolution_is_the_styles(style):
    block = ODResNet(depth=50, style=style, **SMALL).layer2[0]
    strides = (block.conv1.stride[0], block.conv2.stride[0])
    assert strides == ((1, 2) if style == 'pytorch' else (2, 1))


def test_dilated_stages():
    model = ODResNet(depth=18, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), **SMALL)
    assert [o.shape[-1] for o in model(torch.randn(2, 3, 64, 64))] == [16, 8, 8, 8]


def test_checkpointed_blocks_give_the_same_gradients():
    grads = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = ODResNet(depth=18, with_cp=with_cp, norm_eval=True, **SMALL)
        x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).requires_grad_()
        model(x)[-1].square().sum().backward()
        grads.append(model.layer2[0].conv1.weight.grad)
    torch.testing.assert_close(*grads)


def test_init_weights_keeps_odconvs_initialisation_and_zeroes_the_residual():
    model = ODResNet(depth=18, **SMALL)
    model.init_weights()
    block = model.layer2[1]
    assert not block.conv1.attention.channel_fc.weight.any()
    assert block.conv1.weight.std().item() == pytest.approx((2 / (16 * 9)) ** 0.5, rel=0.1)
    assert not block.bn2.weight.any()


def test_pretrained_weights_are_loaded_by_init_cfg(tmp_path):
    donor = ODResNet(depth=18, **SMALL)
    path = tmp_path / 'weights.pth'
    torch.save({'state_dict': donor.state_dict()}, path)
    model = ODResNet(depth=18, init_cfg=dict(type='Pretrained', checkpoint=str(path)), **SMALL)
    model.init_weights()
    for name, value in donor.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize('kind', ['ODConv2d', 'FDConv2d'])
def test_frozen_stages_may_train_their_attentions(kind):
    model = ODResNet(
        18,
        base_channels=8,
        frozen_stages=1,
        odconv_cfg=dict(type=kind, norm_cfg=dict(type='LN')),
        train_frozen_attentions=True,
    )
    model.train()
    sum(y.square().mean() for y in model(torch.randn(2, 3, 64, 64))).backward()
    trained = {n for n, p in model.layer1.named_parameters() if p.grad is not None}
    assert {n.split('.')[1] for n in trained} == {'conv1', 'conv2'}
    assert {n.split('.')[2] for n in trained} >= {'attention'}
    assert not any(n.endswith(('conv1.weight', 'conv2.weight')) for n in trained)
