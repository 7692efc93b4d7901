import pytest
import torch

from mmdet_odconv.functional import bank_from_static_weight


def weight():
    return torch.randn(6, 4, 3, 3, dtype=torch.float64)


@pytest.mark.parametrize('kernel_num', [1, 2, 5])
def test_the_mean_of_the_bank_is_the_weight_over_the_attentions(kernel_num):
    w = weight()
    bank = bank_from_static_weight(w, kernel_num, attention=0.2)
    assert bank.shape == (kernel_num, *w.shape)
    torch.testing.assert_close(bank.mean(0) * 0.2, w, rtol=0, atol=1e-14)


@pytest.mark.parametrize('kernel_num', [2, 3, 8])
def test_the_kernels_differ_by_the_spread(kernel_num):
    w = torch.randn(64, 32, 3, 3, dtype=torch.float64) * 7
    bank = bank_from_static_weight(w, kernel_num, attention=0.5, spread=0.1)
    assert (bank - w / 0.5).std().item() == pytest.approx(0.1 * 14, rel=0.02)


def test_the_generator_decides():
    w = weight()
    first, second, third = (
        bank_from_static_weight(w, 3, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_one_number_and_zeros_are_no_trouble():
    assert bank_from_static_weight(torch.ones(1, 1, 1), 4).isfinite().all()
    assert not bank_from_static_weight(torch.zeros(2, 2, 3, 3), 4).any()
