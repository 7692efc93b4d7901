import itertools

import pytest
import torch

from mmdet_odconv.functional import activate

WIDTHS = (3, 2, 4, 5)  # of the channel, filter, spatial and kernel logits
ACTIVATIONS = ['softmax', 'sigmoid']


def by_hand(logits, temperature, kernel_activation):
    """Each attention from its own part of the logits."""
    channel, filter_, spatial, kernel = (logits / temperature).split(WIDTHS, 1)
    exponentials = kernel.exp()
    if kernel_activation == 'softmax':
        kernel = exponentials / exponentials.sum(1, keepdim=True)
    else:
        kernel = exponentials / (1 + exponentials)
    return [*(1 / (1 + (-part).exp()) for part in (channel, filter_, spatial)), kernel]


@pytest.mark.parametrize('kernel_activation', ACTIVATIONS)
@pytest.mark.parametrize('present', list(itertools.product([True, False], repeat=4))[:-1])
def test_each_attention_is_that_of_its_own_logits(present, kernel_activation):
    logits = torch.randn(2, sum(WIDTHS), dtype=torch.float64)
    expected = by_hand(logits, 1.7, kernel_activation)
    parts = [
        part for part, is_there in zip(logits.split(WIDTHS, 1), present, strict=True) if is_there
    ]
    sizes = [width * is_there for width, is_there in zip(WIDTHS, present, strict=True)]
    actual = activate(torch.cat(parts, 1), sizes, 1.7, kernel_activation)
    for value, by_itself, is_there in zip(actual, expected, present, strict=True):
        assert (value is not None) == is_there
        if is_there:
            torch.testing.assert_close(value, by_itself)


@pytest.mark.parametrize('kernel_activation', ACTIVATIONS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_narrow_types_are_computed_in_float32(kernel_activation, dtype):
    logits = torch.randn(2, sum(WIDTHS)).to(dtype)
    result = activate(logits, WIDTHS, 3.0, kernel_activation)
    assert {attention.dtype for attention in result} == {torch.float32}
    expected = by_hand(logits.float(), 3.0, kernel_activation)
    torch.testing.assert_close(list(result), expected)
