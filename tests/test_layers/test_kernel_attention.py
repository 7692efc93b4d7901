"""CondConv, DyConv and ODConv with some of its attentions, against formulas written out."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import nn

from mmdet_odconv import CondConv2d, DyConv2d, ODConv2d, fuse_odconv_bn, set_temperature
from mmdet_odconv.backbones import ODMobileNetV2, ODResNet

NAMES = ('channel', 'filter', 'spatial', 'kernel')


def randomised(layer):
    """``layer`` in float64, every parameter drawn at random, so that no term vanishes."""
    torch.manual_seed(0)
    for parameter in layer.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def by_sample(layer, x, kernel_attention):
    """Σ_j k_j · W_j for one sample at a time, and a plain convolution with it."""
    outputs = []
    for b in range(len(x)):
        kernel = sum(k * w for k, w in zip(kernel_attention[b], layer.weight, strict=True))
        outputs.append(
            F.conv2d(x[b : b + 1], kernel, layer.bias, layer.stride, layer.padding, layer.dilation)
        )
    return torch.cat(outputs)


@pytest.mark.parametrize('kernel_num', [4, 8])
@pytest.mark.parametrize('size', [1, 3])
def test_condconv(kernel_num, size):
    layer = randomised(CondConv2d(6, 5, size, padding=size // 2, kernel_num=kernel_num))
    x = torch.randn(3, 6, 7, 5, dtype=torch.float64)
    head = layer.attention.kernel_fc
    routing = 1 / (1 + torch.exp(-(x.mean((2, 3)) @ head.weight[:, :, 0, 0].T + head.bias)))
    torch.testing.assert_close(layer(x), by_sample(layer, x, routing))


@pytest.mark.parametrize('temperature', [1.0, 30.0])
def test_dyconv(temperature):
    layer = randomised(DyConv2d(16, 5, 3, stride=2, temperature=temperature))
    assert layer.attention.fc.weight.shape == (4, 16, 1, 1)
    x = torch.randn(3, 16, 7, 5, dtype=torch.float64)
    fc, head = layer.attention.fc, layer.attention.kernel_fc
    h = (x.mean((2, 3)) @ fc.weight[:, :, 0, 0].T).clamp(min=0)
    exponentials = torch.exp((h @ head.weight[:, :, 0, 0].T + head.bias) / temperature)
    attention = exponentials / exponentials.sum(1, keepdim=True)
    torch.testing.assert_close(layer(x), by_sample(layer, x, attention))


SUBSETS = [s for n in range(5) for s in itertools.combinations(NAMES, n)]


@pytest.mark.parametrize('attentions', SUBSETS, ids='+'.join)
def test_odconv_with_some_of_its_attentions(attentions):
    """An attention that is left out does what one that is always 1 does."""
    kernel_num = 3 if 'kernel' in attentions else 1
    args = dict(kernel_num=kernel_num, padding=1, norm_cfg=dict(type='LN'))
    layer = randomised(ODConv2d(4, 6, 3, attentions=attentions, **args))
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    whole = ODConv2d(4, 6, 3, **args).double()
    missing = whole.load_state_dict(layer.state_dict(), strict=False).missing_keys
    assert not {name.split('.')[1].removesuffix('_fc') for name in missing} & set(attentions)
    for name in set(NAMES[:3]) - set(attentions):
        # σ(1000) is 1.
        getattr(whole.attention, f'{name}_fc').reset_to_constant(1000.0)
    y = layer(x)
    torch.testing.assert_close(y, whole(x))
    y.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (dict(attentions=('spatial',), kernel_num=2), "needs the 'kernel' attention.*2"),
        (dict(attentions=('kernels',)), r"attentions must be some of .*\('kernels',\)"),
        (dict(attentions=None), 'attentions must be some of .*None'),
        (dict(attentions='kernel'), "attentions must be some of .*'kernel'"),
        (dict(kernel_activation='relu'), "'softmax' or 'sigmoid', got 'relu'"),
    ],
)
def test_bad_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        ODConv2d(4, 4, 3, **args)


LAYERS = ['CondConv2d', 'DyConv2d']


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('argument', ['norm_cfg', 'attention_bias', 'attentions'])
def test_they_have_arguments_of_their_own_alone(name, argument):
    args = dict(type=name, in_channels=4, out_channels=6, kernel_size=3)
    with pytest.raises(TypeError, match=argument):
        MODELS.build({**args, argument: None})


def test_condconv_has_no_temperature_to_anneal():
    model = nn.Sequential(CondConv2d(4, 6, 3), DyConv2d(6, 4, 3))
    assert set_temperature(model, 30.0) == 1
    assert [layer.temperature for layer in model] == [1.0, 30.0]
    with pytest.raises(ValueError, match='has no temperature, so T must be 1, got 30'):
        model[0].temperature = 30.0


def test_a_bias_for_each_expert():
    layer = randomised(CondConv2d(6, 5, 3, padding=1, expert_bias=True))
    x = torch.randn(3, 6, 7, 5, dtype=torch.float64)
    routing = layer.attention(x).kernel
    biases = routing @ layer.bias
    without = CondConv2d(6, 5, 3, padding=1, bias=False).double()
    without.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(layer(x), without(x) + biases[:, :, None, None])
    conv = nn.Conv2d(6, 5, 3, padding=1).double()
    layer.load_state_dict(conv.state_dict())
    torch.testing.assert_close(layer(x), conv(x))
    block = nn.Sequential(layer, nn.BatchNorm2d(5).double()).eval()
    nn.init.normal_(block[1].running_mean)
    expected = block(x)
    torch.testing.assert_close(fuse_odconv_bn(block)(x), expected)


@pytest.mark.parametrize('name', LAYERS)
def test_the_weights_of_a_plain_convolution_load_as_the_same_function(name):
    conv = nn.Conv2d(4, 6, 3, padding=1)
    layer = MODELS.build(
        dict(type=name, in_channels=4, out_channels=6, kernel_size=3, padding=1, kernel_num=4)
    )
    layer.load_state_dict(conv.state_dict())
    x = torch.randn(3, 4, 8, 8)
    torch.testing.assert_close(layer(x), conv(x))


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('backbone', [ODResNet, ODMobileNetV2])
def test_backbones_take_them(name, backbone):
    args = dict(depth=18, base_channels=8) if backbone is ODResNet else dict(widen_factor=0.25)
    model = backbone(**args, kernel_num=2, odconv_cfg=dict(type=name))
    layers = [m for m in model.modules() if type(m).__name__ == name]
    assert len(layers) >= 16
    assert {m.kernel_num for m in layers} == {2}
    sum(y.square().mean() for y in model(torch.randn(2, 3, 64, 64))).backward()
    assert all(m.weight.grad.abs().sum() > 0 for m in layers)


def test_a_backbone_takes_a_class_as_well_as_a_name():
    model = ODResNet(18, base_channels=8, odconv_cfg=dict(type=CondConv2d))
    assert type(model.layer1[0].conv1) is CondConv2d


@pytest.mark.parametrize('kind', ['Conv2d', 'ODConv1d', 'OdConv2d', nn.Conv2d, 2])
def test_a_backbone_refuses_what_is_no_such_layer(kind):
    with pytest.raises(ValueError, match=r'odconv_cfg\.type must be a 2-D .*got'):
        ODResNet(18, odconv_cfg=dict(type=kind))


@pytest.mark.parametrize('name', LAYERS)
def test_norms_fold_into_them(name):
    layer = MODELS.build(
        dict(type=name, in_channels=4, out_channels=6, kernel_size=3, bias=False, kernel_num=2)
    )
    norm = nn.BatchNorm2d(6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.running_mean)
    model = nn.Sequential(layer, norm).eval()
    x = torch.randn(2, 4, 8, 8)
    expected = model(x)
    assert isinstance(fuse_odconv_bn(model)[1], nn.Identity)
    torch.testing.assert_close(model(x), expected)
