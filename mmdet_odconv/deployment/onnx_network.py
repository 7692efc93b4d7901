"""An exported dense network at work, in place of a detector's backbone, neck and head."""

import json
import os
from typing import Any

import torch
from torch import Tensor, nn

from .dense_network import STRUCTURE, DenseNetwork, require_single_stage, unflatten

_PROVIDERS = ('CUDAExecutionProvider', 'CPUExecutionProvider')


class OnnxNetwork:
    """The head's outputs of a batch, computed by ONNX Runtime image by image.

    Args:
        path: A file of :func:`~mmdet_odconv.deployment.export_dense_network`.

    Raises:
        ValueError: The file is another one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import onnxruntime

        available = onnxruntime.get_available_providers()
        try:
            self.session = onnxruntime.InferenceSession(
                os.fspath(path), providers=[p for p in _PROVIDERS if p in available]
            )
            metadata = self.session.get_modelmeta().custom_metadata_map
            self.structure = json.loads(metadata[STRUCTURE])
        except Exception as error:  # ONNX Runtime's errors have no base class but this
            raise ValueError(
                f'{path} is not a file of tools/deployment/export_onnx.py: '
                f'{str(error).strip() or type(error).__name__}'
            ) from error

    def flat(self, images: Tensor) -> list[Tensor]:
        """The outputs in the file's order; ``images`` has the shape (B, 3, H, W)."""
        runs = [
            self.session.run(None, {'image': image[None].cpu().numpy()}) for image in images.float()
        ]
        return [
            torch.cat([torch.from_numpy(array) for array in arrays]).to(images.device)
            for arrays in zip(*runs, strict=True)
        ]

    def __call__(self, images: Tensor) -> tuple[Any, ...]:
        """The outputs nested as the head returns them."""
        return tuple(unflatten(self.structure, self.flat(images)))


def use_onnx_network(detector: nn.Module, path: str | os.PathLike[str]) -> None:
    """Let ``detector`` predict with the ONNX file in place of its own dense network.

    PyTorch still does the preprocessing, the decoding and the non-maximum suppression. The weights
    of the detector are not used any more.

    Args:
        detector (nn.Module): A single-stage detector of the config that the file was made with.
        path: A file of :func:`~mmdet_odconv.deployment.export_dense_network`.

    Raises:
        ValueError: The detector is not a single-stage detector, or the file was not made by
            :func:`~mmdet_odconv.deployment.export_dense_network`.
    """
    require_single_stage(detector)
    model: Any = detector
    model.extract_feat = OnnxNetwork(path)
    model.bbox_head.forward = _already_computed


def largest_difference(
    detector: nn.Module, path: str | os.PathLike[str], images: list[Tensor]
) -> float:
    """How far the ONNX file is from PyTorch.

    Args:
        detector (nn.Module): The detector that was exported, on the CPU.
        path: The file.
        images (list[Tensor]): Preprocessed batches, (B, 3, H, W) each.

    Returns:
        float: The largest difference of an entry, relative to the largest entry of its output;
        infinite where the shapes differ.
    """
    network, file = DenseNetwork(detector).eval(), OnnxNetwork(path)
    worst = 0.0
    with torch.no_grad():
        for image in images:
            for actual, expected in zip(file.flat(image), network(image), strict=True):
                if actual.shape != expected.shape:
                    return float('inf')
                # An output of zeros must differ by 0, not by 0/0.
                scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
                difference = (actual - expected).abs().max() / scale
                # Not max(): NaN must not pass for small.
                if not difference <= worst:
                    worst = difference.item()
    return worst


def _already_computed(outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return outputs
