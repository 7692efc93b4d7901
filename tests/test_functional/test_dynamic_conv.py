"""The convolution of each sample with a kernel that is made from any tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

from mmdet_odconv.functional import dynamic_conv

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CASES = {
    'plain': {},
    'pointwise': dict(kernel=1),
    '1d': dict(ndim=1),
    '3d': dict(ndim=3, kernel=2),
    'strided': dict(stride=2, padding=1),
    'dilated': dict(dilation=2, padding=(2, 1)),
    'same, uneven': dict(kernel=2, padding='same'),
    'grouped': dict(groups=2, padding=1),
    'depthwise': dict(groups=4, c_out=4, padding=1),
    'one sample': dict(batch=1),
    'large map': dict(size=25),
}


def problem(ndim=2, kernel=3, groups=1, c_out=6, batch=3, size=6, **conv_args):
    """x, a bank of two kernels and mixing factors, whose mixture is a function of three tensors."""
    torch.manual_seed(0)
    double = dict(dtype=torch.float64, requires_grad=True)
    x = torch.randn(batch, 4, *(size,) * ndim, **double)
    bank = torch.randn(2, c_out, 4 // groups, *(kernel,) * ndim, **double)
    factors = torch.randn(batch, 2, **double)
    return x, bank, factors, conv_args | dict(groups=groups)


def mix(bank, factors):
    return torch.einsum('bk,k...->b...', factors.sin(), bank)


def loop(x, bank, factors, bias=None, modulate=None, **conv_args):
    """Sample by sample."""
    rows = []
    for i, sample in enumerate(x):
        kernel = sum(factor.sin() * w for factor, w in zip(factors[i], bank, strict=True))
        row = sample if modulate is None else modulate[i] * sample
        b = None if bias is None else (bias if bias.dim() == 1 else bias[i])
        rows.append(CONV[x.dim() - 2](row[None], kernel, b, **conv_args)[0])
    return torch.stack(rows)


def gradients(y, inputs):
    return torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), inputs)


@pytest.mark.parametrize('case', CASES)
def test_output_and_gradients_are_those_of_a_loop_over_the_samples(case):
    x, bank, factors, conv_args = problem(**CASES[case])
    bias = torch.randn(bank.shape[1], dtype=torch.float64, requires_grad=True)
    inputs = (x, bank, factors, bias)
    expected = loop(*inputs, **conv_args)
    found = dynamic_conv(x, mix, [bank, factors], bias, **conv_args)
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(
            dynamic_conv(x, mix, [bank, factors], bias, **conv_args), expected
        )


def test_a_modulated_input_and_a_bias_for_each_sample():
    x, bank, factors, _ = problem()
    bias = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(3, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    inputs = (x, bank, factors, bias, scale)
    expected = loop(*inputs, padding=1)
    found = dynamic_conv(
        x, mix, [bank, factors], bias, padding=1, modulate=torch.mul, modulators=[scale]
    )
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_first_and_second_derivatives():
    x, bank, factors, _ = problem(batch=2, size=4, c_out=2)

    def function(x, bank, factors):
        return dynamic_conv(
            x, mix, [bank, factors], padding=1, modulate=torch.mul, modulators=[factors[0, 0]]
        )

    assert gradcheck(function, (x, bank, factors))
    assert gradgradcheck(function, (x, bank, factors), atol=1e-4)


def test_only_the_tensors_it_is_given_are_kept_for_the_backward_pass():
    x, bank, factors, _ = problem()
    scale = torch.rand_like(x).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        dynamic_conv(x, mix, [bank, factors], modulate=torch.mul, modulators=[scale])
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, bank, factors, scale)}


@pytest.mark.parametrize('role', ['make_kernels', 'modulate'])
def test_a_function_that_reads_a_parameter_of_its_own_is_refused(role):
    x, bank, factors, _ = problem()
    hidden = torch.ones((), dtype=torch.float64, requires_grad=True)
    make, modulate = mix, None
    if role == 'make_kernels':
        make = lambda *tensors: mix(*tensors) * hidden  # noqa: E731
    else:
        modulate = lambda x: x * hidden  # noqa: E731
    with pytest.raises(RuntimeError, match='none of its arguments'):
        dynamic_conv(x, make, [bank, factors], modulate=modulate)


def test_one_kernel_for_all_samples():
    x, bank, _, _ = problem()
    found = dynamic_conv(x, lambda w: w[:1] * 2, [bank], padding=1)
    expected = F.conv2d(x, 2 * bank[0], padding=1)
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients(found, [x, bank]), gradients(expected, [x, bank]), strict=True):
        torch.testing.assert_close(a, b)


def test_an_empty_batch_keeps_all_parameters_in_the_graph():
    _, bank, _, _ = problem()
    x, factors = torch.zeros(0, 4, 6, 6).double(), torch.zeros(0, 2).double()
    y = dynamic_conv(x, mix, [bank, factors])
    assert y.shape == (0, 6, 4, 4)
    y.sum().backward()
    assert bank.grad is not None
    assert not bank.grad.any()


def test_channels_last_stays_so_and_gives_the_same():
    x, bank, factors, _ = problem()
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    found = dynamic_conv(last, mix, [bank, factors])
    assert found.is_contiguous(memory_format=torch.channels_last)
    expected = dynamic_conv(x, mix, [bank, factors])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, last), gradients(expected, x))


def test_under_autocast_the_kernels_are_made_in_float32():
    x, bank, factors, _ = problem()
    x, bank, factors = (t.detach().float().requires_grad_() for t in (x, bank, factors))
    types = []

    def make(bank, factors):
        kernels = torch.einsum('bk,k...->b...', factors, bank)
        types.append(kernels.dtype)
        return kernels

    with torch.autocast('cpu', torch.bfloat16):
        y = dynamic_conv(x, make, [bank, factors])
    assert y.dtype == torch.bfloat16
    assert types == [torch.float32]
    y.float().sum().backward()
    assert types == [torch.float32] * 2
    assert bank.grad.dtype == factors.grad.dtype == x.grad.dtype == torch.float32


def test_mixed_types_are_refused_as_by_a_convolution():
    x, bank, factors, _ = problem()
    with pytest.raises(RuntimeError, match='should be the same'):
        dynamic_conv(x.float(), mix, [bank, factors])


def test_function_transforms_and_checkpoints_and_compiled_code():
    x, bank, factors, _ = problem()

    def loss(bank, x, factors):
        return dynamic_conv(x, mix, [bank, factors]).square().sum()

    expected = torch.autograd.grad(loss(bank, x, factors), bank)[0]
    torch.testing.assert_close(grad(loss)(bank, x, factors), expected)
    by_sample = vmap(grad(loss), (None, 0, 0))(bank, x[:, None], factors[:, None])
    torch.testing.assert_close(by_sample.sum(0), expected)
    again = checkpoint(loss, bank, x, factors, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, bank)[0], expected)
    compiled = torch.compile(loss, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(bank, x, factors), bank)[0], expected)
