#!/usr/bin/env python
"""Draw the boxes that a detector finds in images into PNG files."""

import argparse
from collections import Counter
from pathlib import Path

import mmcv
from mmdet.apis import inference_detector
from mmdet.registry import VISUALIZERS

from mmdet_odconv import cli, prepare_for_inference


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('image', help='image file, or folder of images')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out-dir', default='outputs', help='folder for the PNGs')
    parser.add_argument('--device', default='cpu', help='for example cpu or cuda:0')
    parser.add_argument('--score-thr', type=float, default=0.3, help='lowest score that is drawn')
    parser.add_argument(
        '--limit',
        type=cli.positive,
        help='use only the first images of the folder, at most this number',
    )
    parser.add_argument(
        '--fuse-conv-bn',
        action='store_true',
        help='fold the BatchNorms into the convolutions before them, ODConv and plain',
    )
    cli.add_collapse(parser)
    cli.add_config_options(parser)
    return parser.parse_args()


def output_files(images: list[Path], folder: Path) -> list[Path]:
    """The PNG of each image: by its name without the ending, where that is no other image's.

    Raises:
        SystemExit: One of them is an image itself, which would be overwritten.
    """
    times = Counter(path.stem for path in images)
    names = [path.stem if times[path.stem] == 1 else path.name for path in images]
    outs = [folder / f'{name}.png' for name in names]
    given = {path.resolve() for path in images}
    for out in outs:
        if out.resolve() in given:
            raise SystemExit(f'{out} would be overwritten; set another folder by --out-dir')
    return outs


def main() -> None:
    args = parse_args()
    images = cli.find_images(args.image)[: args.limit]
    outs = output_files(images, Path(args.out_dir))
    config = cli.load_config(args.config, args.cfg_options)
    model = cli.load_detector(config, args.checkpoint, args.device)
    cli.require_writable(args.out_dir, 'folder', '--out-dir')
    if args.collapse_static:
        cli.collapse_static(model, config, args.collapse_static)
    if args.fuse_conv_bn:
        prepare_for_inference(model)
    palette, classes = (model.dataset_meta.get(name) for name in ('palette', 'classes'))
    if not isinstance(palette, str) and len(palette) < len(classes):
        # The palette is that of the config's test data set, which may have other classes.
        model.dataset_meta['palette'] = 'random'
    visualizer = VISUALIZERS.build(dict(config.visualizer, vis_backends=None))
    visualizer.dataset_meta = model.dataset_meta

    for path, out in zip(images, outs, strict=True):
        image = mmcv.imread(str(path))
        if image is None:
            raise SystemExit(f'cannot be read as an image: {path}')
        image = mmcv.bgr2rgb(image)
        with cli.config_errors_as_exit(config):
            sample = inference_detector(model, str(path))
        # matplotlib 3.11 would enlarge the picture to hold boxes that reach beyond the image.
        boxes = sample.pred_instances.bboxes
        boxes[:, 0::2].clamp_(0, image.shape[1])
        boxes[:, 1::2].clamp_(0, image.shape[0])
        visualizer.add_datasample(
            path.stem,
            image,
            sample,
            draw_gt=False,
            pred_score_thr=args.score_thr,
            out_file=str(out),
        )
        print(f'wrote {out}')


if __name__ == '__main__':
    main()
