"""Linear heads on the same features: one product or several, the same result."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet_odconv.functional import JoinedHeads, linear_heads

SIZES = (5, 7, 1)


def parameters(width=3):
    weights = [nn.Parameter(torch.randn(n, width, 1, 1, dtype=torch.float64)) for n in SIZES]
    biases = [nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in SIZES]
    return weights, biases


class Calls(TorchDispatchMode):
    """Counts the matrix products."""

    products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += 'mm' in function.__name__
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('join', [None, JoinedHeads])
@pytest.mark.parametrize('grad', [True, False])
def test_equals_one_head_after_another(join, grad):
    weights, biases = parameters()
    h = torch.randn(4, 3, dtype=torch.float64)
    expected = [h @ w[:, :, 0, 0].t() + b for w, b in zip(weights, biases, strict=True)]
    with torch.set_grad_enabled(grad):
        actual = linear_heads(h, weights, biases, join and join(weights, biases))
    torch.testing.assert_close(actual, torch.cat(expected, 1))


@pytest.mark.parametrize('join', [None, JoinedHeads])
def test_gradients(join):
    weights, biases = parameters()
    joined = join and join(weights, biases)
    h = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def function(h, *_):
        return linear_heads(h, weights, biases, joined)

    assert torch.autograd.gradcheck(function, (h, *weights, *biases))
    assert torch.autograd.gradgradcheck(function, (h, *weights, *biases))


def test_joined_heads_are_one_product():
    weights, biases = parameters()
    joined = JoinedHeads(weights, biases)
    h = torch.randn(4, 3, dtype=torch.float64)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), Calls() as calls:
            linear_heads(h, weights, biases, joined)
        assert calls.products == 1


@pytest.mark.parametrize('write', ['in_place', 'data', 'new_memory'])
def test_follows_whatever_is_written_to_a_parameter(write):
    weights, biases = parameters()
    joined = JoinedHeads(weights, biases)
    h = torch.randn(4, 3, dtype=torch.float64)
    value = torch.randn_like(weights[1])
    with torch.no_grad():
        if write == 'in_place':
            weights[1].copy_(value)
        elif write == 'data':
            weights[1].data.copy_(value)
        else:
            weights[1].data = value
        actual = linear_heads(h, weights, biases, joined)
    torch.testing.assert_close(actual[:, 5:12], h @ value[:, :, 0, 0].t() + biases[1])


def test_overwriting_a_weight_before_the_backward_pass_is_an_error():
    weights, biases = parameters()
    h = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = linear_heads(h, weights, biases, JoinedHeads(weights, biases))
    with torch.no_grad():
        weights[1].zero_()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.sum().backward()
