import pytest
import torch

from mmdet_odconv.functional import sigmoid_attention, softmax_attention


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
