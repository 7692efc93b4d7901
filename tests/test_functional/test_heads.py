"""Linear heads on the same features: one product or several, the same result."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet_odconv.functional import lay_out_consecutively, linear_heads

SIZES = (5, 7, 1)


def parameters(layout, width=3):
    weights = [nn.Parameter(torch.randn(n, width, 1, 1, dtype=torch.float64)) for n in SIZES]
    biases = [nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in SIZES]
    if layout == 'consecutive':
        lay_out_consecutively(weights)
        lay_out_consecutively(biases)
    return weights, biases


class Calls(TorchDispatchMode):
    """Counts the matrix products."""

    products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += 'mm' in function.__name__
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('layout', ['apart', 'consecutive'])
@pytest.mark.parametrize('grad', [True, False])
def test_equals_one_head_after_another(layout, grad):
    weights, biases = parameters(layout)
    h = torch.randn(4, 3, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        actual = linear_heads(h, weights, biases)
    expected = [h @ w[:, :, 0, 0].t() + b for w, b in zip(weights, biases, strict=True)]
    torch.testing.assert_close(actual, torch.cat(expected, 1))


@pytest.mark.parametrize('layout', ['apart', 'consecutive'])
def test_gradients(layout):
    weights, biases = parameters(layout)
    h = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def function(h, *_):
        return linear_heads(h, weights, biases)

    assert torch.autograd.gradcheck(function, (h, *weights, *biases))
    assert torch.autograd.gradgradcheck(function, (h, *weights, *biases))


def test_consecutive_heads_are_one_product():
    weights, biases = parameters('consecutive')
    h = torch.randn(4, 3, dtype=torch.float64)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), Calls() as calls:
            linear_heads(h, weights, biases)
        assert calls.products == 1


@pytest.mark.parametrize('write', ['in_place', 'data', 'new_memory'])
def test_follows_whatever_is_written_to_a_parameter(write):
    weights, biases = parameters('consecutive')
    h = torch.randn(4, 3, dtype=torch.float64)
    linear_heads(h, weights, biases)
    value = torch.randn_like(weights[1])
    with torch.no_grad():
        if write == 'in_place':
            weights[1].copy_(value)
        elif write == 'data':
            weights[1].data.copy_(value)
        else:
            weights[1].data = value
        actual = linear_heads(h, weights, biases)
    torch.testing.assert_close(actual[:, 5:12], h @ value[:, :, 0, 0].t() + biases[1])


def test_one_parameter_moved_between_forward_and_backward():
    weights, biases = parameters('consecutive')
    h = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = linear_heads(h, weights, biases)
    weights[1].data = weights[1].data.clone()
    y.sum().backward()
    expected = torch.cat([w.flatten(1) for w in weights]).sum(0).expand(4, -1)
    torch.testing.assert_close(h.grad, expected)


def test_shared_memory_stays_shared():
    weights, _ = parameters('consecutive')
    for weight in weights:
        weight.data.share_memory_()
    lay_out_consecutively(weights)
    assert all(weight.is_shared() for weight in weights)
