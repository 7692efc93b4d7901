"""The squeeze, and its gradient added to that of the convolution."""

import pytest
import torch

from mmdet_odconv.functional import global_average_pool, pool_beside


def use(x, pooled):
    """One use of each, as a layer's convolution and its attention make."""
    return (x * x).sum() + (pooled**3).sum()


@pytest.mark.parametrize('size', [(3,), (3, 4), (2, 3, 2)])
def test_average_pool_takes_any_number_of_dimensions(size):
    x = torch.randn(2, 5, *size)
    expected = torch.stack([x[b, c].mean() for b in range(2) for c in range(5)]).view(2, 5)
    torch.testing.assert_close(global_average_pool(x), expected)


@pytest.mark.parametrize('memory', [torch.contiguous_format, torch.channels_last])
def test_gradient_equals_that_of_autograd(memory):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=memory)
    x.requires_grad_()
    expected = torch.autograd.grad(use(x, global_average_pool(x)), x)[0]
    torch.testing.assert_close(torch.autograd.grad(use(*pool_beside(x)), x)[0], expected)


def test_gradcheck():
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: use(*pool_beside(x)), x)
    assert torch.autograd.gradgradcheck(lambda x: use(*pool_beside(x)), x)


@pytest.mark.parametrize('used', [0, 1])
def test_one_of_the_two_may_go_unused(used):
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad((x, global_average_pool(x))[used].square().sum(), x)
    torch.testing.assert_close(
        torch.autograd.grad(pool_beside(x)[used].square().sum(), x), expected
    )


def test_an_input_used_elsewhere_too_gets_all_its_gradients():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    seen = []
    y = x * 2
    y.register_hook(lambda grad: seen.append(grad.clone()))
    (use(*pool_beside(y)) + use(*pool_beside(y)) + y.sum()).backward()
    first = x.grad.clone()
    x.grad = None
    (2 * use(x * 2, global_average_pool(x * 2)) + (x * 2).sum()).backward()
    torch.testing.assert_close(first, x.grad)
    torch.testing.assert_close(seen, [first / 2])
