"""The dense network of a single-stage detector: backbone, neck and head."""

import copy
from typing import Any

from mmdet.models.detectors import SingleStageDetector
from torch import Tensor, nn

from .fuse import prepare_for_inference

# Where the file says how its flat list of outputs is nested in what the head returns.
STRUCTURE = 'mmdet_odconv.structure'


class DenseNetwork(nn.Module):
    """What the ``tensor`` mode of a single-stage detector computes, as a flat tuple of tensors.

    Args:
        detector (nn.Module): The detector; its norms are folded in a copy.

    Raises:
        ValueError: The detector is not a single-stage one.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        require_single_stage(detector)
        self.detector = prepare_for_inference(copy.deepcopy(detector).eval())

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """From a batch of preprocessed images, (B, 3, H, W), to the head's outputs."""
        tensors: list[Tensor] = []
        flatten(self.detector(image, mode='tensor'), tensors)
        return tuple(tensors)


def require_single_stage(detector: nn.Module) -> None:
    """Raise ValueError unless the detector is a backbone, a neck and one dense head of images."""
    if not isinstance(detector, SingleStageDetector) or not hasattr(detector, 'bbox_head'):
        raise ValueError(
            f'{type(detector).__name__} is not a single-stage detector with a dense head: what '
            'comes after its neck depends on the proposals or queries of each image'
        )
    require_whole_averages(detector)


def require_whole_averages(detector: nn.Module) -> None:
    """Raise ValueError if the attentions of ``detector`` leave out the padding of its batches."""
    if any(getattr(module, 'valid_sizes', None) is not None for module in detector.modules()):
        raise ValueError(
            "the detector leaves out the padding of its batches (attention_pool='valid'), and the "
            "network of an ONNX file does not know it; export it with attention_pool='all', and "
            'give the file images without padding'
        )


def flatten(outputs: Any, tensors: list[Tensor]) -> Any:
    """Append the tensors in nested lists and tuples to ``tensors``.

    Returns:
        The nesting with each tensor replaced by its number, for :func:`unflatten`.
    """
    if isinstance(outputs, Tensor):
        tensors.append(outputs)
        return len(tensors) - 1
    if isinstance(outputs, list | tuple):
        return [flatten(output, tensors) for output in outputs]
    if outputs is None:
        return None
    raise ValueError(f'a head must return tensors, not {type(outputs).__name__}')


def unflatten(structure: Any, tensors: list[Tensor]) -> Any:
    """The inverse of :func:`flatten`: lists of lists of tensors."""
    if isinstance(structure, list):
        return [unflatten(part, tensors) for part in structure]
    return None if structure is None else tensors[structure]
