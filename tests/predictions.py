"""What detectors predict, and whether two of them predict the same."""

from typing import Any

import torch
from torch import nn


def predict(model: nn.Module, batch: Any) -> list[Any]:
    """The predictions of ``model``, in the mode that it is in, for what a data loader gives."""
    with torch.no_grad():
        return model(**model.data_preprocessor(batch, training=False), mode='predict')


def assert_same_predictions(actual: list[Any], expected: list[Any], score_atol: float) -> None:
    """Fail unless the boxes and scores of every image are the same, and there are some."""
    for sample, other in zip(actual, expected, strict=True):
        sample, other = sample.pred_instances, other.pred_instances
        assert len(other) > 0
        torch.testing.assert_close(sample.scores, other.scores, rtol=0, atol=score_atol)
        torch.testing.assert_close(sample.bboxes, other.bboxes, rtol=1e-4, atol=1e-3)
