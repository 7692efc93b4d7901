import itertools

import pytest
import torch

from mmdet_odconv.functional import annealed_temperature, sigmoid_attention, softmax_attention
from tests.conftest import ROOT, load_cases


def test_temperature_divides_the_logits():
    logits = torch.tensor([[0.0, 30.0, -60.0]], dtype=torch.float64)
    expected = 1 / (1 + torch.exp(-logits / 30))
    torch.testing.assert_close(sigmoid_attention(logits, 30.0), expected)
    weights = softmax_attention(logits, 30.0)
    torch.testing.assert_close(weights, torch.exp(logits / 30) / torch.exp(logits / 30).sum())


@pytest.mark.parametrize('attention', [sigmoid_attention, softmax_attention])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_narrow_types_are_computed_in_float32(attention, dtype):
    logits = torch.randn(2, 4).to(dtype)
    result = attention(logits, 3.0)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, attention(logits.float(), 3.0))


@pytest.mark.parametrize('case', load_cases(ROOT / 'tests/data/temperature.json'))
def test_linear_schedule_is_the_published_one(case):
    done = case['epoch'] * case['iters_per_epoch'] + case['iteration']
    total = case['temp_epoch'] * case['iters_per_epoch']
    actual = annealed_temperature(done, total, case['temp_init'])
    assert actual == pytest.approx(case['temperature'], rel=1e-12)


def test_inverse_schedule_takes_equal_steps_of_the_inverse():
    inverses = [1 / annealed_temperature(n, 10, 30.0, 'inverse') for n in range(12)]
    steps = [b - a for a, b in itertools.pairwise(inverses)]
    assert inverses[0] == pytest.approx(1 / 30)
    assert steps[:10] == pytest.approx([(1 - 1 / 30) / 10] * 10)
    assert inverses[10] == inverses[11] == 1


def test_no_annealing_and_unknown_schedule():
    assert annealed_temperature(1, 0, 30.0) == 1.0
    with pytest.raises(ValueError, match="'cosine'"):
        annealed_temperature(1, 10, 30.0, 'cosine')
