#!/usr/bin/env python
"""Let an ONNX file of export_onnx.py compute with whole numbers of 8 bits where that is possible.

The ranges of the activations are those that it has on the given images. The backbone, the neck and
the convolutions of the head get 8 bits. The attentions of ODConv layers and what comes after the
head stay as they are, with --plain-only the convolutions of ODConv layers too.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import onnx
from onnx_demo import Detector
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from mmdet_odconv import cli


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('onnx', help='file of export_onnx.py')
    parser.add_argument('images', help='image or folder of images, like those of its use')
    parser.add_argument('--out', required=True, help='file to write: .onnx, or .xml with nncf')
    parser.add_argument('--limit', type=cli.positive, default=64, help='use at most so many images')
    parser.add_argument(
        '--by',
        choices=['onnxruntime', 'nncf'],
        default='onnxruntime',
        help='ONNX Runtime quantizes (default), or NNCF, for OpenVINO',
    )
    parser.add_argument(
        '--plain-only',
        action='store_true',
        help='quantize only convolutions whose weights are constants, and none of ODConv',
    )
    cli.add_force(parser)
    return parser.parse_args()


def inputs_of(detector: Detector, paths: list[Path]) -> Iterator[dict[str, Any]]:
    """What the file is given for each image."""
    for path in paths:
        parts = detector.preprocess(cv2.imread(str(path)))
        yield dict(zip(('image', 'size', 'scale'), (part[None] for part in parts), strict=True))


class Images(CalibrationDataReader):
    """What ONNX Runtime asks for one image after another."""

    def __init__(self, detector: Detector, paths: list[Path]) -> None:
        self.rest = inputs_of(detector, paths)

    def get_next(self) -> Any:
        return next(self.rest, None)


def left_out(model: onnx.ModelProto, plain_only: bool) -> list[str]:
    """The nodes that stay as they are: all but convolutions, and of these what ODConv computes."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type != 'Conv' or (plain_only and node.input[1] not in constants)
    ]


def by_onnx_runtime(args: argparse.Namespace, detector: Detector, paths: list[Path]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prepared = f'{folder}/prepared.onnx'
        quant_pre_process(args.onnx, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            args.out,
            Images(detector, paths),
            op_types_to_quantize=['Conv'],
            nodes_to_exclude=left_out(onnx.load(prepared), args.plain_only),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    written = onnx.load(args.out)
    del written.metadata_props[:]
    written.metadata_props.extend(onnx.load(args.onnx).metadata_props)
    onnx.save(written, args.out)


def by_nncf(args: argparse.Namespace, detector: Detector, paths: list[Path]) -> None:
    """By way of OpenVINO: NNCF refuses an ONNX file whose convolutions have computed weights."""
    import nncf
    import openvino

    model = openvino.Core().read_model(args.onnx)
    there = {operation.get_friendly_name() for operation in model.get_ops()}
    names = [n for n in left_out(onnx.load(args.onnx), args.plain_only) if n in there]
    quantized = nncf.quantize(
        model,
        nncf.Dataset(list(inputs_of(detector, paths))),
        subset_size=len(paths),
        ignored_scope=nncf.IgnoredScope(names=names, validate=False),
    )
    openvino.save_model(quantized, args.out)


def main() -> None:
    args = parse_args()
    if args.by == 'nncf':
        cli.require_packages('nncf', 'openvino')
        if not args.out.endswith('.xml'):
            raise SystemExit(f'--by nncf writes a file for OpenVINO: {args.out} must end in .xml')
    cli.require_new_file(args.out, args.force)
    paths = cli.find_images(args.images)[: args.limit]
    try:
        detector = Detector(args.onnx)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if args.by == 'nncf':
        by_nncf(args, detector, paths)
    else:
        by_onnx_runtime(args, detector, paths)
    print(f'wrote {args.out}, from {len(paths)} images')


if __name__ == '__main__':
    main()
