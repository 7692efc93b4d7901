import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmdet_odconv import CondConv2d, DyConv2d, ODConv2d
from mmdet_odconv.analysis import (
    AttentionMeter,
    attention_statistics,
    kernel_similarity,
    share_by_class,
    static_attentions,
)

# What makes each layer, and the attentions that it has.
LAYERS = {
    'four attentions': (ODConv2d, dict(kernel_num=3), 'channel filter spatial kernel'),
    'one kernel': (ODConv2d, dict(kernel_num=1), 'channel filter spatial'),
    '1x1': (ODConv2d, dict(kernel_size=1), 'channel filter kernel'),
    'groups': (ODConv2d, dict(groups=4), 'channel filter spatial kernel'),
    'depthwise': (ODConv2d, dict(groups=8), 'channel spatial kernel'),
    'spatial alone': (ODConv2d, dict(kernel_num=1, attentions=('spatial',)), 'spatial'),
    'no attention': (ODConv2d, dict(kernel_num=1, attentions=()), ''),
    'CondConv': (CondConv2d, {}, 'kernel'),
    'DyConv': (DyConv2d, {}, 'kernel'),
}


@pytest.fixture(params=LAYERS)
def case(request):
    """A layer, the attentions that it has, and images that differ in their averages."""
    kind, kwargs, names = LAYERS[request.param]
    layer = kind(8, 8, **dict(kernel_size=3, attention_init='published') | kwargs)
    images = torch.randn(6, 8, 7, 7) + torch.randn(6, 8, 1, 1)
    return SimpleNamespace(layer=layer.eval(), names=names.split(), images=images)


def test_the_spread_is_that_of_the_attentions_themselves(case):
    (record,) = attention_statistics(case.layer, [case.images])
    attentions = case.layer.attention(case.images)
    assert record.samples == 6
    assert list(record.std) == list(record.saturated) == list(record.head_weight) == case.names
    for name in case.names:
        std = getattr(attentions, name).std(0, correction=0).mean()
        assert record.std[name] == pytest.approx(std.item(), rel=1e-4)
        assert record.std[name] > 1e-3
        head = getattr(case.layer.attention, f'{name}_fc').weight
        assert record.head_weight[name] == pytest.approx(head.abs().mean().item())
    assert record.largest_std == max(record.std.values(), default=0)
    if case.layer.kernel_num == 1:
        assert record.kernel_entropy is record.kernel_similarity is None
    else:
        shares = attentions.kernel / attentions.kernel.sum(1, keepdim=True)
        entropy = torch.distributions.Categorical(shares).entropy()
        most = torch.tensor(case.layer.kernel_num).log()
        assert record.kernel_entropy == pytest.approx((entropy / most).mean().item(), rel=1e-4)


def test_batches_do_not_matter(case):
    (whole,) = attention_statistics(case.layer, [case.images])
    (parts,) = attention_statistics(case.layer, case.images.split([1, 3, 2]))
    assert parts.samples == whole.samples
    assert parts.std == pytest.approx(whole.std)
    assert parts.saturated == whole.saturated
    assert parts.kernel_entropy == pytest.approx(whole.kernel_entropy)


def test_an_image_is_computed_with_its_own_attentions_when_they_are_the_mean(case):
    x, other = case.images[:1], case.images[1:2]
    with AttentionMeter(case.layer) as meter:
        case.layer(x)
    y, dynamic = case.layer(x), case.layer(other)
    with static_attentions(case.layer, {'': meter.means()['']}):
        torch.testing.assert_close(case.layer(x), y)
        static = case.layer(other)
    assert torch.equal(static, dynamic) == (not case.names)
    assert torch.equal(case.layer(other), dynamic)


def test_the_zero_start_is_static():
    (record,) = attention_statistics(ODConv2d(4, 6, 3), [torch.randn(5, 4, 8, 8)])
    assert record.largest_std == pytest.approx(0, abs=1e-7)
    assert set(record.head_weight.values()) == {0.0}
    assert set(record.saturated.values()) == {0.0}
    assert record.kernel_entropy == pytest.approx(1)


def test_a_saturated_layer():
    layer = ODConv2d(4, 6, 3)
    layer.attention.kernel_fc.bias.data[2] = 50
    layer.attention.filter_fc.bias.data[:] = torch.tensor([50.0, 50, 50, -50, 0, 0])
    (record,) = attention_statistics(layer, [torch.randn(5, 4, 8, 8)])
    assert record.kernel_entropy == pytest.approx(0, abs=1e-6)
    expected = dict(channel=0, filter=4 / 6, spatial=0, kernel=1)
    assert record.saturated == pytest.approx(expected)


def test_similarity_of_the_kernels():
    layer = ODConv2d(1, 1, 2, kernel_num=3)
    first, second = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0.0, 1, 0, 0])
    layer.weight.data = torch.stack([first, second, 5 * first]).view_as(layer.weight)
    assert kernel_similarity(layer) == pytest.approx(1 / 3)  # of three pairs one is the same
    layer.weight.data = first.expand(3, 4).view_as(layer.weight).clone()
    assert kernel_similarity(layer) == pytest.approx(1)


def test_share_of_the_variance_by_class():
    classes = ['a', 'b', 'c', 'd'] * 50
    of_class = torch.randn(4, 6).repeat(50, 1)
    noise = torch.randn(200, 6)
    assert share_by_class(of_class, classes) == pytest.approx(1)
    assert 0 <= share_by_class(noise, classes) < 0.03
    assert 0.2 < share_by_class(of_class + noise, classes) < 0.8
    assert share_by_class(noise, ['a'] * 200) is None
    assert share_by_class(noise, [str(i) for i in range(200)]) is None
    assert share_by_class(torch.full((200, 6), 0.9), classes) is None


def test_layers_have_the_names_of_the_model_and_unused_ones_are_left_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.unused = ODConv2d(4, 4, 3), ODConv2d(4, 4, 3)

        def forward(self, levels):
            return [self.head(level) for level in levels]

    levels = [torch.randn(2, 4, 8, 8), torch.randn(2, 4, 4, 4)]
    (record,) = attention_statistics(Model(), [levels])
    assert (record.name, record.samples) == ('head', 4)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(ODConv2d(4, 4, 3), nn.BatchNorm2d(4).eval())
    state = copy.deepcopy(model.state_dict())
    attention_statistics(model, [torch.randn(3, 4, 8, 8)])
    assert [m.training for m in model] == [True, False]
    assert not model[0].attention._forward_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_what_cannot_be_analysed():
    with pytest.raises(ValueError, match=r'\(Conv2d\) has no ODConv layer'):
        attention_statistics(nn.Conv2d(3, 3, 3), [])
    with pytest.raises(ValueError, match='no images were given'):
        attention_statistics(ODConv2d(3, 3, 3), [])
    with (
        pytest.raises(ValueError, match="'conv'"),
        static_attentions(ODConv2d(3, 3, 3), {'conv': {}}),
    ):
        pass
