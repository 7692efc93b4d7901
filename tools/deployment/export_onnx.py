#!/usr/bin/env python
"""Write a detector to an ONNX file that gives boxes, scores and labels of preprocessed images.

The file is compared with PyTorch in ONNX Runtime before the tool ends, on random images or on given
ones. tools/deployment/onnx_demo.py runs it without PyTorch.
"""

import argparse
import os
from pathlib import Path

import torch
from mmcv.transforms import Compose
from mmdet.utils import get_test_pipeline_cfg
from torch import Tensor, nn

from mmdet_odconv import cli
from mmdet_odconv.deployment import (
    disagreement,
    export_dense_network,
    export_detector,
    largest_difference,
)

TOLERANCE = 1e-4  # of the outputs of a head
SHARE = 0.05  # of the detections, whose order can turn where two scores are nearly equal


def batch(text: str) -> int | None:
    return None if text == 'free' else cli.positive(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', required=True, help='ONNX file to write')
    parser.add_argument(
        '--raw',
        action='store_true',
        help='write the outputs of the head, without decoding and NMS (single-stage detectors)',
    )
    parser.add_argument(
        '--batch',
        type=batch,
        default=1,
        metavar='N|free',
        help='how many images the file takes at once, or free for any number (default: 1)',
    )
    parser.add_argument(
        '--shape',
        type=cli.positive,
        nargs=2,
        metavar=('H', 'W'),
        default=(256, 320),
        help='size of the example; the file takes others too (default: 256 320)',
    )
    parser.add_argument(
        '--fixed-shape',
        action='store_true',
        help='write a file that takes images of --shape only',
    )
    parser.add_argument('--images', help='image or folder of images to compare on')
    parser.add_argument(
        '--limit',
        type=cli.positive,
        default=4,
        help='use only the first images of the folder, at most this number',
    )
    cli.add_collapse(parser)
    cli.add_force(parser)
    cli.add_config_options(parser)
    args = parser.parse_args()
    if args.raw and (args.batch != 1 or args.fixed_shape):
        parser.error('--raw writes files for one image of any size: leave out --batch and others')
    return args


def preprocessed(detector: nn.Module, paths: list[Path]) -> list[Tensor]:
    """The images as the detector's test pipeline and preprocessor hand them to the network."""
    pipeline = Compose(get_test_pipeline_cfg(detector.cfg))
    batches = []
    for path in paths:
        data = pipeline(dict(img_path=str(path), img_id=0))
        data = dict(inputs=[data['inputs']], data_samples=[data['data_samples']])
        batches.append(detector.data_preprocessor(data, training=False)['inputs'])
    return batches


def example_images(args: argparse.Namespace) -> list[Tensor]:
    """Random images of the sizes and of a number that the file is to take."""
    height, width = args.shape
    number = args.batch or 3
    sizes = [(height, width), *([] if args.fixed_shape else [(height + 64, width + 32)])]
    return [torch.randn(number, 3, *size) for size in sizes]


def compare(args: argparse.Namespace, detector: nn.Module, path: str, images: list[Tensor]) -> str:
    """Say how far the file is from PyTorch.

    Raises:
        ValueError: It is too far.
    """
    if args.raw:
        difference = largest_difference(detector, path, images)
        if not difference <= TOLERANCE:
            raise ValueError(
                f'ONNX Runtime and PyTorch differ by {difference:.1e} of the largest output, more '
                f'than {TOLERANCE:.0e}, so {args.out} is not written'
            )
        return f'it differs from PyTorch by {difference:.1e} at most'
    alone, number = disagreement(detector, path, images)
    if alone > SHARE * number:
        raise ValueError(
            f'{alone} of {number} detections of ONNX Runtime and PyTorch are not those of the '
            f'other, so {args.out} is not written'
        )
    return f'{number - alone} of {number} detections in it and in PyTorch are the same'


def main() -> None:
    args = parse_args()
    cli.require_packages('onnx', 'onnxruntime', 'onnxscript')
    config = cli.load_config(args.config, args.cfg_options)
    cli.require_new_file(args.out, args.force)
    paths = cli.find_images(args.images)[: args.limit] if args.images else []
    detector = cli.load_detector(config, args.checkpoint)
    if args.collapse_static:
        cli.collapse_static(detector, config, args.collapse_static)

    # Under another name until it has passed, so that a bad file is never taken for a good one.
    unverified = f'{args.out}.unverified'
    shape = tuple(args.shape)
    try:
        if args.raw:
            export_dense_network(detector, unverified, shape)
        else:
            export_detector(detector, unverified, shape, args.batch, not args.fixed_shape)
        images = preprocessed(detector, paths) if paths else example_images(args)
        for image in images if args.fixed_shape else ():
            if image.shape[2:] != shape:
                raise ValueError(
                    f'the images have {image.shape[2]} x {image.shape[3]} pixels; '
                    f'give this size by --shape, got {shape[0]} x {shape[1]}'
                )
        result = compare(args, detector, unverified, images)
        os.replace(unverified, args.out)
    except (RuntimeError, ValueError) as error:  # PyTorch's own, say of a shape that is too small
        raise SystemExit(str(error)) from error
    finally:
        Path(unverified).unlink(missing_ok=True)
    what = f'{len(images)} images' if paths else 'random images'
    print(f'wrote {args.out}; {result}, on {what}')


if __name__ == '__main__':
    main()
