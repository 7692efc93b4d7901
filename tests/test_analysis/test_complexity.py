"""Counts of parameters and multiply-adds, against formulas written out by hand."""

import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from torch import nn

from mmdet_odconv import ODConv1d, ODConv2d, ODMobileNetV2, ODResNet
from mmdet_odconv.analysis import count_complexity, plain_twin


class Network(nn.Module):
    """A plain convolution, two ODConv layers, of which one is depthwise, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.layers = nn.Sequential(
            ODConv2d(32, 48, 3, padding=1, kernel_num=4),
            ODConv2d(48, 48, (1, 3), padding=(0, 1), groups=48, kernel_num=1),
        )
        self.fc = nn.Linear(48, 10)

    def forward(self, x):
        return self.fc(self.layers(self.norm(self.stem(x))).mean((2, 3)))


def test_a_network_costs_what_the_formulas_say():
    found = count_complexity(Network(), torch.zeros(1, 3, 16, 24))
    positions = 8 * 12
    stem = 3 * 32 * 9 * positions
    assert found['stem'] == (3 * 32 * 9, stem, 0, 0)
    # A hidden layer of 16 units with its norm, and heads for c, f, s and k with their biases.
    dense, entries = found['layers.0'], 32 * 48 * 9
    assert dense.convolution == entries * positions
    assert dense.mixture == 4 * entries
    assert dense.attention == 32 * 16 + 16 * (32 + 48 + 9 + 4)
    assert dense.parameters == 4 * entries + 48 + dense.attention + 2 * 16 + (32 + 48 + 9 + 4)
    # Depthwise there is no f, and one kernel is not mixed.
    depthwise = found['layers.1']
    assert depthwise[1:] == (48 * 3 * positions, 0, 48 * 16 + 16 * (48 + 3))
    assert found['layers'].multiply_adds == dense.multiply_adds + depthwise.multiply_adds
    assert found['fc'].multiply_adds == 48 * 10
    assert found[''].multiply_adds == found['layers'].multiply_adds + stem + 480


def test_each_image_of_a_batch_has_a_mixture_of_its_own():
    model = Network()
    one, three = (count_complexity(model, torch.zeros(n, 3, 16, 24))[''] for n in (1, 3))
    assert three.parameters == one.parameters
    assert [*three[1:]] == [3 * number for number in one[1:]]


def test_the_plain_twin_has_plain_convolutions_of_the_same_geometry():
    model = Network()
    twin = plain_twin(model)
    assert all(type(layer) is nn.Conv2d for layer in twin.layers)
    assert isinstance(model.layers[0], ODConv2d)
    x = torch.zeros(1, 3, 16, 24)
    assert twin(x).shape == model(x).shape
    own, plain = count_complexity(model, x)[''], count_complexity(twin, x)['']
    assert plain.convolution == own.convolution
    assert (plain.mixture, plain.attention) == (0, 0)
    layer = plain_twin(nn.Sequential(ODConv1d(4, 6, 3, 2, padding='valid', bias=False)))[0]
    assert (type(layer), layer.stride, layer.padding, layer.bias) == (
        nn.Conv1d,
        (2,),
        'valid',
        None,
    )


def test_a_model_is_left_as_it_was():
    model = Network().train()
    model.norm.eval()  # as a backbone with norm_eval=True has it
    forward = model.forward
    count_complexity(model, torch.zeros(1, 3, 16, 24))
    assert model.training
    assert not model.norm.training
    assert model.forward == forward


def test_a_forward_of_the_models_own_is_kept():
    model = Network()
    model.forward = model.stem.forward  # as a block with `forward_fuse` has it
    found = count_complexity(model, torch.zeros(1, 3, 16, 24))
    assert found[''].multiply_adds == 3 * 32 * 9 * 8 * 12
    assert model.forward == model.stem.forward


def test_mmengines_own_counter_sees_mixtures_and_attentions():
    """What mmdet's get_flops.py calls; it counts the elements of norms besides."""
    model, x = Network().eval(), torch.zeros(1, 3, 16, 24)
    counted = get_model_complexity_info(model, inputs=(x,), show_table=False, show_arch=False)
    own = count_complexity(model, x)['']
    norms = counted['flops'] - own.multiply_adds
    assert 0 <= norms <= 4 * (32 * 8 * 12 + 2 * 16)
    assert counted['params'] == own.parameters


@pytest.mark.slow
# By the authors of ODConv, in millions and to their digits, with the 1000-class head:
# https://github.com/OSVAI/ODConv
@pytest.mark.parametrize(
    ('backbone', 'features', 'parameters', 'plain'),
    [
        (dict(type=ODResNet, depth=18, style='caffe'), 512, 44.90, 1814),
        (dict(type=ODResNet, depth=50, style='caffe'), 2048, 90.67, 3858),
        (dict(type=ODResNet, depth=101, style='caffe', kernel_num=2), 2048, 90.44, 7570),
        (dict(type=ODMobileNetV2), 1280, 11.51, 300.8),
        (dict(type=ODMobileNetV2, widen_factor=0.75), 1280, 7.50, 209.1),
        (dict(type=ODMobileNetV2, widen_factor=0.5), 1280, 4.44, 97.1),
    ],
    ids=lambda value: str(value) if isinstance(value, float) else '',
)
def test_published_counts(backbone, features, parameters, plain):
    options = dict(backbone)
    kind = options.pop('type')
    out_indices = (3,) if kind is ODResNet else (7,)
    if kind is ODResNet:
        options['norm_eval'] = False
    model = nn.Sequential(kind(out_indices=out_indices, **options), Last(features))
    own = count_complexity(model, torch.zeros(1, 3, 224, 224))['']
    assert own.parameters / 1e6 == pytest.approx(parameters, abs=0.005)
    # The convolutions alone are the published multiply-adds of the plain network.
    assert own.convolution / 1e6 == pytest.approx(plain, abs=0.5 if plain > 1000 else 0.05)
    assert own.mixture > 0


class Last(nn.Module):
    """The head of a classifier."""

    def __init__(self, features):
        super().__init__()
        self.fc = nn.Linear(features, 1000)

    def forward(self, x):
        return self.fc(x[-1].mean((2, 3)))
