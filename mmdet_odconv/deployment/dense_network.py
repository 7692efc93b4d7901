"""The dense network of a single-stage detector (backbone, neck, head) as one ONNX file.

The kernel of an ODConv layer depends on the sample, and ONNX's convolution has one kernel for the
whole batch, or as many groups as are fixed at export. So the file takes one image at a time, with
which the layer is a plain convolution whose weight was just computed; height and width are free.
The alternative that leaves the batch free, a matrix product over unfolded inputs, needs as many
times the memory as the kernel has positions.
"""

import copy
import json
import os
from typing import Any

import torch
from mmdet.models.detectors import SingleStageDetector
from torch import Tensor, nn

from ..compat import ONNX_EXPORT
from .fuse import fuse_odconv_bn

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
        self.detector = fuse_odconv_bn(copy.deepcopy(detector).eval())

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """From a batch of preprocessed images, (B, 3, H, W), to the head's outputs."""
        tensors: list[Tensor] = []
        flatten(self.detector(image, mode='tensor'), tensors)
        return tuple(tensors)


def export_dense_network(
    detector: nn.Module, path: str | os.PathLike[str], shape: tuple[int, int]
) -> None:
    """Write the dense network of ``detector`` to an ONNX file with free height and width.

    Args:
        detector (nn.Module): A single-stage detector in evaluation mode, on the CPU.
        path: The file to write.
        shape (tuple[int, int]): Height and width of the example; the file takes others too.

    Raises:
        ValueError: The detector is not a single-stage detector, or it has an operation that ONNX
            does not have.
        RuntimeError: The version of PyTorch is older than 2.6.
    """
    import onnx

    network = DenseNetwork(detector).eval()
    if not ONNX_EXPORT:
        raise RuntimeError(
            f'torch {torch.__version__} is installed; writing ONNX files needs torch>=2.6'
        )
    height, width = shape
    # A square example would make the exporter take height and width for one and the same.
    image = torch.zeros(1, 3, height, width + 32 * (height == width))
    free = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        tensors: list[Tensor] = []
        structure = flatten(network.detector(image, mode='tensor'), tensors)
        try:
            program = torch.onnx.export(
                network,
                (image,),
                dynamo=True,
                dynamic_shapes=({2: free, 3: free},),
                input_names=['image'],
                output_names=[f'output{i}' for i in range(len(tensors))],
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().partition('\n')[0]
            raise ValueError(
                f'{type(detector).__name__} cannot be written as ONNX: {reason}'
            ) from error
    assert program is not None  # which only the old exporter returns
    model = program.model_proto
    model.metadata_props.add(key=STRUCTURE, value=json.dumps(structure))
    onnx.save(model, os.fspath(path))


def require_single_stage(detector: nn.Module) -> None:
    """Raise ValueError unless the detector is a backbone, a neck and one dense head of images."""
    if not isinstance(detector, SingleStageDetector) or not hasattr(detector, 'bbox_head'):
        raise ValueError(
            f'{type(detector).__name__} is not a single-stage detector with a dense head: what '
            'comes after its neck depends on the proposals or queries of each image'
        )
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
