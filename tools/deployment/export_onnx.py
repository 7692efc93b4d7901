#!/usr/bin/env python
"""Write the dense network of a single-stage detector (backbone, neck, head) to an ONNX file.

The file takes one preprocessed image of any height and width that the detector takes. It is
compared with PyTorch in ONNX Runtime before the tool ends, at two sizes or on given images.
"""

import argparse
import os
from pathlib import Path

import torch
from mmcv.transforms import Compose
from mmdet.utils import get_test_pipeline_cfg
from torch import Tensor, nn

from mmdet_odconv import cli
from mmdet_odconv.deployment import export_dense_network, largest_difference

TOLERANCE = 1e-4


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', required=True, help='ONNX file to write')
    parser.add_argument(
        '--shape',
        type=cli.positive,
        nargs=2,
        metavar=('H', 'W'),
        default=(256, 320),
        help='size of the example; the file takes others too (default: 256 320)',
    )
    parser.add_argument('--images', help='image or folder of images to compare on')
    parser.add_argument(
        '--limit',
        type=cli.positive,
        default=4,
        help='use only the first images of the folder, at most this number',
    )
    cli.add_force(parser)
    cli.add_config_options(parser)
    return parser.parse_args()


def preprocessed(detector: nn.Module, paths: list[Path]) -> list[Tensor]:
    """The images as the detector's test pipeline and preprocessor hand them to the network."""
    pipeline = Compose(get_test_pipeline_cfg(detector.cfg))
    batches = []
    for path in paths:
        data = pipeline(dict(img_path=str(path), img_id=0))
        data = dict(inputs=[data['inputs']], data_samples=[data['data_samples']])
        batches.append(detector.data_preprocessor(data, training=False)['inputs'])
    return batches


def main() -> None:
    args = parse_args()
    cli.require_packages('onnx', 'onnxruntime', 'onnxscript')
    config = cli.load_config(args.config, args.cfg_options)
    cli.require_new_file(args.out, args.force)
    paths = cli.find_images(args.images)[: args.limit] if args.images else []
    detector = cli.load_detector(config, args.checkpoint)

    # Under another name until it has passed, so that a bad file is never taken for a good one.
    unproved = f'{args.out}.unproved'
    try:
        export_dense_network(detector, unproved, tuple(args.shape))
        if paths:
            images = preprocessed(detector, paths)
        else:
            height, width = args.shape
            sizes = ((height, width), (height + 64, width + 32))
            images = [torch.randn(1, 3, *size) for size in sizes]
        difference = largest_difference(detector, unproved, images)
        if not difference <= TOLERANCE:
            raise ValueError(
                f'ONNX Runtime and PyTorch differ by {difference:.1e} of the largest output, more '
                f'than {TOLERANCE:.0e}, so {args.out} is not written'
            )
        os.replace(unproved, args.out)
    except (RuntimeError, ValueError) as error:  # PyTorch's own, say of a shape that is too small
        raise SystemExit(str(error)) from error
    finally:
        Path(unproved).unlink(missing_ok=True)
    what = f'{len(images)} images' if paths else 'random images of two sizes'
    print(f'wrote {args.out}; it differs from PyTorch by {difference:.1e} at most on {what}')


if __name__ == '__main__':
    main()
