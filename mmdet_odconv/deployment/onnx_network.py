"""ONNX files at work: in place of a detector of mmdet, or of its backbone, neck and head."""

import json
import os
from typing import Any

import numpy as np
import torch
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
from mmengine.structures import InstanceData
from torch import Tensor, nn

from .dense_network import (
    STRUCTURE,
    DenseNetwork,
    require_single_stage,
    require_whole_averages,
    unflatten,
)
from .detections import Detections
from .onnx_export import DESCRIPTION

_PROVIDERS = ('CUDAExecutionProvider', 'CPUExecutionProvider')


class OnnxNetwork:
    """What an ONNX file computes of a batch, by ONNX Runtime.

    Args:
        path: A file of :func:`~mmdet_odconv.deployment.export_detector` or
            :func:`~mmdet_odconv.deployment.export_dense_network`.

    Attributes:
        structure: How the head nests its outputs; None in a file with boxes.
        batch (int, optional): How many images the file takes at once, None for any number.

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
            has_boxes = DESCRIPTION in metadata
            self.structure = None if has_boxes else json.loads(metadata[STRUCTURE])
        except Exception as error:  # ONNX Runtime's errors have no base class but this
            raise ValueError(
                f'{path} is not a file of tools/deployment/export_onnx.py: '
                f'{str(error).strip() or type(error).__name__}'
            ) from error
        size = self.session.get_inputs()[0].shape[0]
        self.batch = size if isinstance(size, int) else None

    def flat(self, *inputs: Tensor) -> list[Tensor]:
        """The outputs in the file's order for inputs in its order, whose batch may be any."""
        names = [given.name for given in self.session.get_inputs()]
        device, number = inputs[0].device, len(inputs[0])
        step, runs = self.batch or number, []
        for start in range(0, number, step):
            # The last few are filled up with copies of the last one.
            rows = np.arange(start, start + step).clip(max=number - 1)
            part = [given.float().cpu().numpy()[rows] for given in inputs]
            runs.append(self.session.run(None, dict(zip(names, part, strict=True))))
        return [
            torch.from_numpy(np.concatenate(arrays)[:number]).to(device)
            for arrays in zip(*runs, strict=True)
        ]

    def __call__(self, images: Tensor) -> tuple[Any, ...]:
        """The head's outputs nested as the head returns them."""
        return tuple(unflatten(self.structure, self.flat(images)))


def use_onnx_network(detector: nn.Module, path: str | os.PathLike[str]) -> None:
    """Let ``detector`` predict with an ONNX file in place of its own weights.

    PyTorch still does the preprocessing, and where the file has the outputs of the head, the
    decoding and the non-maximum suppression.

    Args:
        detector (nn.Module): A detector of the config that the file was made with.
        path: A file of :func:`~mmdet_odconv.deployment.export_detector` or
            :func:`~mmdet_odconv.deployment.export_dense_network`.

    Raises:
        ValueError: The file is another one, or it has the outputs of a head and the detector is
            not a single-stage detector.
    """
    require_whole_averages(detector)
    model: Any = detector
    network = OnnxNetwork(path)
    if network.structure is None:
        model.predict = _Predictions(model, network)
        return
    require_single_stage(detector)
    model.extract_feat = network
    model.bbox_head.forward = _already_computed


class _Predictions:
    """The ``predict`` of a detector, by a file with boxes."""

    def __init__(self, detector: Any, network: OnnxNetwork) -> None:
        self.add = detector.add_pred_to_datasample
        self.network = network
        roi = getattr(detector, 'roi_head', None)
        self.mask_threshold = (getattr(roi, 'test_cfg', None) or {}).get('mask_thr_binary', 0.5)

    def __call__(self, images: Tensor, samples: list[Any], rescale: bool = True) -> list[Any]:
        sizes = torch.tensor([sample.img_shape[:2] for sample in samples], device=images.device)
        scales = torch.ones_like(sizes, dtype=torch.float32)
        if rescale:
            scales = scales.new_tensor([sample.scale_factor[:2] for sample in samples])
        outputs = self.network.flat(images, sizes, scales)
        results = []
        for sample, boxes, scores, labels, *masks in zip(samples, *outputs, strict=True):
            found = labels >= 0
            result = InstanceData(bboxes=boxes[found], scores=scores[found], labels=labels[found])
            if masks:
                shape = sample.ori_shape if rescale else sample.img_shape
                result.masks = self._pasted(masks[0][found], boxes[found], shape)
            results.append(result)
        return self.add(samples, results)

    def _pasted(self, masks: Tensor, boxes: Tensor, shape: tuple[int, int]) -> Tensor:
        whole = torch.zeros(len(boxes), *shape[:2], dtype=torch.bool, device=boxes.device)
        for i in range(len(boxes)):  # one after another: each as large as the image
            part, where = _do_paste_mask(masks[i][None, None], boxes[i][None], *shape[:2])
            whole[(i, *where)] = part[0] >= self.mask_threshold
        return whole


def disagreement(
    detector: nn.Module, path: str | os.PathLike[str], images: list[Tensor]
) -> tuple[int, int]:
    """How many detections of the ONNX file and of PyTorch the other side does not have.

    A detection is the same if its label is, its score to 1e-3 and its corners to 0.1 pixels.

    Args:
        detector (nn.Module): The detector that was exported, on the CPU.
        path: The file.
        images (list[Tensor]): Preprocessed batches, (B, 3, H, W) each.

    Returns:
        tuple[int, int]: How many there are on one side only, and how many on both sides together.
    """
    network, file = Detections(detector).eval(), OnnxNetwork(path)
    alone = number = 0
    for image in images:
        size = torch.tensor([image.shape[2:]] * len(image), dtype=torch.float32)
        with torch.no_grad():
            ours = network(image, size, torch.ones_like(size))
        theirs = file.flat(image, size, torch.ones_like(size))
        for i in range(len(image)):
            sides = [_rows_of(*(output[i] for output in side[:3])) for side in (ours, theirs)]
            number += len(sides[0]) + len(sides[1])
            for one, other in (sides, sides[::-1]):
                near = (one[:, None] - other[None]).abs() <= one.new_tensor([0.1] * 4 + [1e-3, 0.5])
                alone += int((~near.all(2).any(1)).sum())
    return alone, number


def _rows_of(boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """Corners, score and label of each detection that there is."""
    return torch.cat([boxes, scores[:, None], labels[:, None]], 1)[labels >= 0]


def largest_difference(
    detector: nn.Module, path: str | os.PathLike[str], images: list[Tensor]
) -> float:
    """How far an ONNX file with the outputs of a head is from PyTorch.

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
