import pytest
import torch

from mmdet_odconv.functional import Attentions, mix_kernel_bank, odconv
from mmdet_odconv.functional.formula import multiply_patches
from mmdet_odconv.functional.implementation import Geometry

DTYPE = torch.float64


def random_attentions(batch, c_in, c_out, positions, k):
    draw = lambda *shape: torch.rand(*shape, dtype=DTYPE, requires_grad=True)  # noqa: E731
    return Attentions(draw(batch, c_in), draw(batch, c_out), draw(batch, positions), draw(batch, k))


def test_mixture_is_the_weighted_sum_of_the_kernels():
    bank = torch.randn(3, 4, 2, 3, 3, dtype=DTYPE)
    spatial, kernel = torch.rand(5, 9, dtype=DTYPE), torch.rand(5, 3, dtype=DTYPE)
    mixed = mix_kernel_bank(bank, spatial, kernel)
    for b in range(5):
        expected = sum(kernel[b, j] * spatial[b].reshape(3, 3) * bank[j] for j in range(3))
        torch.testing.assert_close(mixed[b], expected)


def test_samples_share_one_kernel_without_spatial_and_kernel_attention():
    bank = torch.randn(1, 4, 2, 1, 1)
    assert mix_kernel_bank(bank, None, None) is bank


@pytest.mark.parametrize('ndim', [1, 2, 3])
@pytest.mark.parametrize('groups', [1, 2])
def test_gradients_are_those_of_finite_differences(ndim, groups):
    c_in, c_out, k, batch = 4, 2, 2, 2
    size = (5, 4, 3)[:ndim]
    x = torch.randn(batch, c_in, *size, dtype=DTYPE, requires_grad=True)
    bank = torch.randn(k, c_out, c_in // groups, *(3,) * ndim, dtype=DTYPE, requires_grad=True)
    bias = torch.randn(c_out, dtype=DTYPE, requires_grad=True)
    attentions = random_attentions(batch, c_in, c_out, 3**ndim, k)

    def function(x, bank, bias, *attentions):
        return odconv(x, bank, Attentions(*attentions), bias, padding=1, groups=groups)

    assert torch.autograd.gradcheck(function, (x, bank, bias, *attentions))


def test_constant_attentions_of_one_give_the_plain_convolution_of_the_summed_bank():
    x, bank = torch.randn(2, 4, 7, 7, dtype=DTYPE), torch.randn(3, 6, 4, 3, 3, dtype=DTYPE)
    ones = [torch.ones(2, n, dtype=DTYPE) for n in (4, 6, 9, 3)]
    expected = torch.nn.functional.conv2d(x, bank.sum(0), stride=2)
    torch.testing.assert_close(odconv(x, bank, Attentions(*ones), stride=2), expected)


@pytest.mark.parametrize(
    ('ndim', 'groups', 'stride', 'padding', 'dilation'),
    [(1, 1, 1, 1, 1), (2, 1, 2, 1, 1), (2, 2, 1, 0, 2), (2, 4, 2, 2, 1), (3, 1, 2, 1, 1)],
)
def test_products_of_kernels_and_patches_are_the_convolution(
    ndim, groups, stride, padding, dilation
):
    x = torch.randn(3, 4, *(9, 8, 7)[:ndim], dtype=DTYPE)
    kernels = torch.randn(3, 8, 4 // groups, *(3, 2, 3)[:ndim], dtype=DTYPE)
    options = (stride,) * ndim, (padding,) * ndim, (dilation,) * ndim, groups
    conv = getattr(torch.nn.functional, f'conv{ndim}d')
    expected = torch.cat([conv(x[i : i + 1], kernels[i], None, *options) for i in range(3)])
    torch.testing.assert_close(multiply_patches(x, kernels, Geometry(*options)), expected)
