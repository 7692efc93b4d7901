"""The dynamic convolution of docs/own_layer.md, and conversion to classes of users."""

import re

import pytest
import torch
from mmcv.cnn import build_conv_layer
from mmengine.registry import MODELS
from torch import nn
from torch.autograd import gradcheck

from mmdet_odconv import ODConv2d, ODResNet, convert_to_odconv, prepare_for_inference
from mmdet_odconv.analysis import count_complexity
from mmdet_odconv.layers import ODAttention
from tests.conftest import ROOT

PAGE = (ROOT / 'docs/own_layer.md').read_text(encoding='utf-8')


@pytest.fixture(scope='module')
def layer_type():
    code = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)[0]
    assert code.count('\n') <= 100
    namespace = {}
    exec(compile(code, 'docs/own_layer.md', 'exec'), namespace)
    yield namespace['LowRankConv2d']
    MODELS.module_dict.pop('LowRankConv2d')


def moved(layer):
    """``layer`` with a branch that depends on the image."""
    nn.init.normal_(layer.branch.fc.weight)
    return layer


def test_it_computes_its_formula_and_its_gradients(layer_type):
    layer = moved(layer_type(4, 6, 3, padding=1, groups=2, rank=2).double())
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    rows = []
    for sample in x:
        a = layer.branch.fc(sample.mean((1, 2)))
        change = (layer.branch.u * a) @ layer.branch.v
        kernel = layer.weight + change.view_as(layer.weight)
        rows.append(nn.functional.conv2d(sample[None], kernel, layer.bias, padding=1, groups=2))
    torch.testing.assert_close(layer(x), torch.cat(rows))
    assert gradcheck(layer, x)


def test_it_is_converted_trained_fused_and_counted(layer_type):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
    model = nn.Sequential(model, nn.Conv2d(6, 4, 1)).eval()
    nn.init.normal_(model[0][1].running_mean)
    x = torch.randn(2, 4, 8, 8)
    expected = model(x)
    report = convert_to_odconv(model, layer='LowRankConv2d', rank=2, include='')
    assert report.converted == ['0.0', '1']
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    assert all(p.grad is not None for p in moved(model[0][0]).parameters())
    expected = model(x)
    torch.testing.assert_close(prepare_for_inference(model)(x), expected)
    assert isinstance(model[0][1], nn.Identity)
    assert count_complexity(model, x)['0.0'].multiply_adds > 2 * 8 * 8 * 6 * 4 * 9


def test_it_is_built_by_its_name_and_in_a_backbone(layer_type):
    assert isinstance(build_conv_layer(dict(type='LowRankConv2d'), 4, 6, 3), layer_type)
    model = ODResNet(18, base_channels=8, odconv_cfg=dict(type='LowRankConv2d', rank=2))
    assert type(model.layer1[0].conv1) is layer_type


class HardSigmoid(ODAttention):
    def forward(self, x):
        attentions = super().forward(x)
        return attentions._replace(channel=(attentions.channel.logit() / 6 + 0.5).clamp(0, 1))


class HardODConv2d(ODConv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.attention.__class__ = HardSigmoid


def test_conversion_refuses_a_class_whose_start_is_another_function():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3))
    before = [type(module) for module in model]
    with pytest.raises(ValueError, match=r'HardODConv2d gives something else, \d+\.\d% off'):
        convert_to_odconv(model, layer=HardODConv2d, include='')
    assert [type(module) for module in model] == before
