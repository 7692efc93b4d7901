"""Detectors as ONNX files: up to the boxes, or up to the outputs of a single-stage head."""

import json
import os
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import ONNX_EXPORT
from .dense_network import STRUCTURE, DenseNetwork, flatten
from .detections import Detections
from .onnx_operators import TRANSLATIONS
from .preprocessing import describe_preprocessing
from .written_layer import use_written_layers

# Where a file with boxes says how its input is made, and what its outputs are.
DESCRIPTION = 'mmdet_odconv.detector'


def export_detector(
    detector: nn.Module,
    path: str | os.PathLike[str],
    shape: tuple[int, int],
    batch: int | None = 1,
    free_size: bool = True,
) -> None:
    """Write ``detector`` to an ONNX file, from preprocessed images to boxes, scores and labels.

    The inputs and outputs are those of :class:`~mmdet_odconv.deployment.Detections`. Its metadata
    say what a caller needs, as JSON under the key ``mmdet_odconv.detector``: what
    :func:`describe_preprocessing` returns, ``classes``, ``score_threshold``, ``outputs`` and
    ``batch``.

    Args:
        detector (nn.Module): The detector, on the CPU.
        path: The file to write.
        shape (tuple[int, int]): Height and width of the images.
        batch (int, optional): How many images the file takes at once, None for any number.
            Default: 1.
        free_size (bool): Whether it takes images of other sizes too. Default: True.

    Raises:
        ValueError: The detector cannot be written (:class:`Detections`), or has an operation that
            ONNX does not have.
        RuntimeError: The version of PyTorch is older than 2.6.
    """
    network = Detections(detector).eval()
    classes = (getattr(detector, 'dataset_meta', None) or {}).get('classes')
    description = dict(
        describe_preprocessing(detector),
        classes=None if classes is None else list(classes),
        score_threshold=float(network.test_cfg.get('score_thr', 0)),
        outputs=network.output_names,
        batch=batch,
    )
    # torch.export takes a free dimension for a constant where the example has 1.
    image = _example(shape, batch or 2, free_size)
    size = torch.tensor(image.shape[2:], dtype=torch.float32).repeat(len(image), 1)
    inputs = dict(image=image, size=size, scale=torch.ones_like(size))
    free = [*([0] if batch is None else []), *([2, 3] if free_size else [])]
    _write(network, inputs, free, network.output_names, path, DESCRIPTION, description)


def export_dense_network(
    detector: nn.Module, path: str | os.PathLike[str], shape: tuple[int, int]
) -> None:
    """Write backbone, neck and head of ``detector`` to an ONNX file with free height and width.

    Args:
        detector (nn.Module): A single-stage detector, on the CPU.
        path: The file to write.
        shape (tuple[int, int]): Height and width of the example; the file takes others too.

    Raises:
        ValueError: The detector is not a single-stage detector, or it has an operation that ONNX
            does not have.
        RuntimeError: The version of PyTorch is older than 2.6.
    """
    network = DenseNetwork(detector).eval()
    image, tensors = _example(shape, 1, True), list[Tensor]()
    with torch.no_grad():
        structure = flatten(network.detector(image, mode='tensor'), tensors)
    names = [f'output{i}' for i in range(len(tensors))]
    _write(network, dict(image=image), [2, 3], names, path, STRUCTURE, structure)


def _example(shape: tuple[int, int], batch: int, free_size: bool) -> Tensor:
    height, width = shape
    # A square example would make the exporter take height and width for one and the same.
    return torch.zeros(batch, 3, height, width + 32 * (free_size and height == width))


def _write(
    network: Any,
    inputs: dict[str, Tensor],
    free: list[int],
    outputs: list[str],
    path: str | os.PathLike[str],
    key: str,
    metadata: Any,
) -> None:
    import onnx
    import onnxscript.optimizer

    if not ONNX_EXPORT:
        raise RuntimeError(
            f'torch {torch.__version__} is installed; writing ONNX files needs torch>=2.6'
        )
    # The other inputs have the batch in common with the images, and no size.
    shapes = {
        name: {dim: torch.export.Dim.DYNAMIC for dim in free if dim < value.dim()}
        for name, value in inputs.items()
    }
    use_written_layers(network)
    with torch.no_grad():
        try:
            # Not by the exporter itself: mmdet takes other, older ways where it notices one.
            exported = torch.export.export(
                network, (), kwargs=inputs, dynamic_shapes=shapes, strict=False
            )
            program = torch.onnx.export(
                exported,
                dynamo=True,
                input_names=list(inputs),
                output_names=outputs,
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, torch._dynamo.exc.TorchDynamoException) as error:
            reason = str(error.__cause__ or error).strip().partition('\n')[0]
            raise ValueError(
                f'{type(network.detector).__name__} cannot be written as ONNX: {reason}'
            ) from error
    assert program is not None  # which only the old exporter returns
    # The exporter's own limits leave a reshape of each bank to every run.
    whole = dict(input_size_limit=2**31, output_size_limit=2**31)
    onnxscript.optimizer.optimize(program.model, num_iterations=1, **whole)
    model = program.model_proto
    model.metadata_props.add(key=key, value=json.dumps(metadata))
    onnx.save(model, os.fspath(path))
