"""What a call of a layer costs beside its convolution, in operations and in Python calls."""

import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet_odconv import CondConv2d, DyConv2d, ODConv2d, prepare_for_inference
from mmdet_odconv.functional import Attentions, odconv


class Operations(TorchDispatchMode):
    """Remembers the names of all ATen operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def operations(layer, x):
    with Operations() as found:
        layer(x)
    return found.names


def python_calls(layer, x):
    calls = []
    sys.setprofile(lambda frame, event, _: calls.append(frame) if event == 'call' else None)
    try:
        layer(x)
    finally:
        sys.setprofile(None)
    return len(calls) - 1  # but for the lambda's own


@pytest.mark.parametrize('bias', [True, False])
def test_an_evaluation_makes_few_operations_and_calls(bias):
    layer, x = ODConv2d(16, 16, 3, padding=1, bias=bias).eval(), torch.randn(1, 16, 4, 4)
    with torch.no_grad():
        layer(x)  # what is remembered of shapes is remembered now
        assert len(operations(layer, x)) <= 28
        assert python_calls(layer, x) <= 70
        prepare_for_inference(layer)
        assert len(operations(layer, x)) <= 19
        assert python_calls(layer, x) <= 40


# Operations that only look at memory in another way, or reserve it.
VIEWS = {'view', '_unsafe_view', 't', 'unsqueeze', 'squeeze', 'expand', 'split_with_sizes'}
VIEWS |= {'transpose', 'detach', 'alias', 'empty', 'slice', 'select', 'permute'}


def kernels(names):
    """How many kernels a GPU would launch for these operations."""
    launched = [name.split('.')[0] for name in names if name.split('.')[0] not in VIEWS]
    # A convolution's backward pass has one for the input and one for the weight.
    return len(launched) + launched.count('convolution_backward')


@pytest.mark.parametrize('prepared', [False, True])
def test_an_accelerator_launches_few_kernels(prepared):
    """Of the operator that GPUs get, and of the layer with its attention and BatchNorm."""
    torch.manual_seed(0)
    layer = ODConv2d(16, 16, 3, padding=1, bias=False, strategy='grouped_conv')
    x = torch.randn(4, 16, 8, 8, requires_grad=True)
    if prepared:
        prepare_for_inference(nn.Sequential(layer.eval()))
        with torch.no_grad():
            assert kernels(operations(layer, x)) <= 12
        return
    attentions = [a.detach().requires_grad_() for a in layer.attention(x)]
    bank = layer.weight

    def operator(x):
        return odconv(x, bank, Attentions(*attentions), padding=1, strategy='grouped_conv')

    y = operator(x)
    assert kernels(operations(operator, x)) <= 12
    assert kernels(operations(y.backward, torch.randn_like(y))) <= 25
    y = layer(x)
    assert kernels(operations(layer, x)) <= 16
    assert kernels(operations(y.backward, torch.randn_like(y))) <= 32


@pytest.mark.parametrize('kind', [CondConv2d, DyConv2d, partial(ODConv2d, attentions=['kernel'])])
def test_absent_attentions_cost_nothing(kind):
    """No tensor of ones, and no product with a factor that is 1."""
    layer, x = kind(8, 8, 3, padding=1).eval(), torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        names = operations(layer, x)
    assert not {'ones', 'new_ones', 'mul', 'mul_', 'cat'} & {name.split('.')[0] for name in names}


@pytest.mark.parametrize(('kernel_size', 'batch'), [(1, 1), (1, 4), (3, 1)])
@pytest.mark.parametrize('groups', [1, 8])
def test_channels_last_is_taken_without_a_copy(kernel_size, batch, groups):
    layer = ODConv2d(8, 8, kernel_size, padding=kernel_size // 2, groups=groups).eval()
    x = torch.randn(batch, 8, 6, 6).to(memory_format=torch.channels_last)
    with torch.no_grad():
        names = operations(layer, x)
        y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    if batch == 1 or groups == 1:
        assert not {'clone.default', 'copy_.default', '_to_copy.default'} & {*names}
    torch.testing.assert_close(y, layer(x.contiguous()))


def test_plain_changes_of_the_geometry_are_followed():
    """As those of an ``nn.Conv2d`` are, by backbones that replace strides by dilations."""
    layer, x = ODConv2d(4, 4, 3, stride=2, padding=1).eval(), torch.randn(1, 4, 8, 8)
    assert layer(x).shape[2:] == (4, 4)
    layer.stride, layer.dilation, layer.padding = (1, 1), (2, 2), (2, 2)
    other = ODConv2d(4, 4, 3, padding=2, dilation=2).eval()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), other(x))
