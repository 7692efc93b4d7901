"""collapse_static_layers on models whose attentions are known to move, or not to."""

import pytest
import torch
from torch import nn

from mmdet_odconv import (
    CondConv2d,
    DyConv2d,
    ODConv1d,
    ODConv2d,
    ODConv3d,
    collapse_static_layers,
    convert_to_odconv,
)


def images(count=6, channels=4, size=6, ndim=2):
    """Images that differ in the means of their channels."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(count, 2, channels, *[1] * ndim, generator=generator)
    return list(means + torch.randn(count, 2, channels, *[size] * ndim, generator=generator))


def of_constant_attentions(layer):
    """``layer`` with attentions that differ from each other, and hardly from image to image."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in layer.attention.named_parameters():
            if name.endswith('_fc.weight'):
                parameter.mul_(1e-6)
            elif name.endswith('_fc.bias'):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


@pytest.mark.parametrize(
    'layer',
    [
        ODConv2d(4, 6, 3, padding=1, attention_init='published'),
        ODConv2d(4, 6, 3, stride=2, groups=2, bias=False, attention_init='published'),
        ODConv2d(4, 4, 3, groups=4, dilation=2, attention_init='published'),
        ODConv2d(4, 6, 1, kernel_num=1, attention_init='published'),
        ODConv2d(4, 6, 3, padding=1, padding_mode='reflect', attention_init='published'),
        ODConv2d(4, 6, 3, kernel_num=1, attentions=('filter',), attention_init='published'),
        ODConv1d(4, 6, 3, attention_init='published'),
        ODConv3d(4, 6, 3, attention_init='published'),
        CondConv2d(4, 6, 3),
        DyConv2d(4, 6, 3),
    ],
    ids=lambda layer: f'{type(layer).__name__} {layer.extra_repr()}',
)
def test_a_layer_that_does_not_move_becomes_the_same_plain_one(layer):
    model = nn.Sequential(of_constant_attentions(layer).eval())
    x = images(1, ndim=layer.ndim)[0]
    expected = model(x)
    report = collapse_static_layers(model, [x], threshold=0.01)
    assert type(model[0]) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    assert report.collapsed == ['0']
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
    assert report.largest_change < 1e-3


def test_a_layer_that_moves_stays():
    model = nn.Sequential(
        ODConv2d(4, 4, 3, attention_init='published'),
        of_constant_attentions(ODConv2d(4, 4, 1, attention_init='published')),
    )
    modes = [m.training for m in model]
    report = collapse_static_layers(model, images())
    assert type(model[0]) is ODConv2d
    assert type(model[1]) is nn.Conv2d
    assert report.collapsed == ['1']
    assert report.std['0'] > report.threshold
    assert '1 of 2' in str(report)
    assert '0 varies most' in str(report)
    assert [m.training for m in model] == modes


def test_a_converted_model_goes_back_to_its_static_weights():
    conv = nn.Conv2d(4, 6, 3)
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    model.load_state_dict({'0.weight': conv.weight, '0.bias': conv.bias})
    convert_to_odconv(model, include='')
    report = collapse_static_layers(model, images())
    torch.testing.assert_close(model[0].weight, conv.weight)
    torch.testing.assert_close(model[0].bias, conv.bias)
    assert report.largest_change < 1e-5


def test_the_largest_change_is_that_of_the_outputs():
    model = nn.Sequential(ODConv2d(4, 4, 3, attention_init='published')).eval()
    inputs = images()
    before = [model(x) for x in inputs]
    report = collapse_static_layers(
        model, inputs, threshold=1.0, forward=lambda x: dict(y=model(x))
    )
    changes = [
        ((model(x) - y).abs().max() / y.square().mean().sqrt()).item()
        for x, y in zip(inputs, before, strict=True)
    ]
    assert report.largest_change == pytest.approx(max(changes))
    assert report.largest_change > 0.01


def test_a_layer_at_two_places_is_replaced_at_both():
    layer = of_constant_attentions(ODConv2d(4, 4, 1, attention_init='published'))
    model = nn.Sequential(layer, nn.ReLU(), layer)
    collapse_static_layers(model, images(), threshold=0.01)
    assert type(model[0]) is nn.Conv2d
    assert model[0] is model[2]


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match='no ODConv layer'):
        collapse_static_layers(nn.Sequential(nn.Conv2d(4, 4, 1)), images())
    model = nn.Sequential(ODConv2d(4, 4, 1))
    with pytest.raises(ValueError, match='no images were given'):
        collapse_static_layers(model, [])
    with pytest.raises(ValueError, match='threshold must be at least 0, got -1'):
        collapse_static_layers(model, images(), threshold=-1)
