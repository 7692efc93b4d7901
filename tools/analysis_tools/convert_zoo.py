#!/usr/bin/env python
"""Convert detectors of mmdet's zoo and write what became of them as a table in Markdown."""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.analysis import FlopAnalyzer
from mmengine.hub import get_config
from mmengine.model import revert_sync_batchnorm
from torch import nn

from mmdet_odconv import cli, convert_to_odconv

# The configs of mmdet, by what they stand for.
DETECTORS = {
    'RetinaNet': 'retinanet/retinanet_r50_fpn_1x_coco.py',
    'ATSS': 'atss/atss_r50_fpn_1x_coco.py',
    'GFL': 'gfl/gfl_r50_fpn_1x_coco.py',
    'FCOS': 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'TOOD': 'tood/tood_r50_fpn_1x_coco.py',
    'PAA': 'paa/paa_r50_fpn_1x_coco.py',
    'YOLOX': 'yolox/yolox_tiny_8xb8-300e_coco.py',
    'YOLOv3': 'yolo/yolov3_d53_8xb8-320-273e_coco.py',
    'RTMDet': 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    'SSD': 'ssd/ssd300_coco.py',
    'Faster R-CNN': 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'Cascade R-CNN': 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
    'Mask R-CNN': 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'HTC': 'htc/htc_r50_fpn_1x_coco.py',
    'Sparse R-CNN': 'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py',
    'CenterNet': 'centernet/centernet_r18_8xb16-crop512-140e_coco.py',
    'DETR': 'detr/detr_r50_8xb2-150e_coco.py',
    'Deformable DETR': 'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    'DINO': 'dino/dino-4scale_r50_8xb2-12e_coco.py',
}
BACKBONES = {
    'ResNet': 'retinanet/retinanet_r18_fpn_1x_coco.py',
    'ResNeXt': 'faster_rcnn/faster-rcnn_x101-32x4d_fpn_1x_coco.py',
    'Res2Net': 'res2net/faster-rcnn_res2net-101_fpn_2x_coco.py',
    'ResNeSt': 'resnest/faster-rcnn_s50_fpn_syncbn-backbone+head_ms-range-1x_coco.py',
    'RegNet': 'regnet/retinanet_regnetx-800MF_fpn_1x_coco.py',
    'HRNet': 'hrnet/faster-rcnn_hrnetv2p-w18-1x_coco.py',
    'MobileNetV2': 'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py',
    'Darknet': 'yolo/yolov3_d53_8xb8-ms-416-273e_coco.py',
    'CSPNeXt': 'rtmdet/rtmdet_s_8xb32-300e_coco.py',
    'Swin': 'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
}
# The only convolution of a Swin transformer is its patch embedding, which has to be asked for.
INCLUDE = {'Swin': ['patch_embed']}

PROSE = """\
# ODConv over MMDetection's zoo

Made by `python tools/analysis_tools/convert_zoo.py`: detectors built from mmdet's own configs and
converted by `convert_to_odconv(model, kernel_num={kernel_num})`, that is, in the backbone
without its stem and its 1×1 shortcuts. `tests/test_conversion/test_zoo.py` converts each of them,
trains it for a step, tests it, saves it and loads it. A Swin transformer has no convolution but its
patch embedding, so that was converted, by `include='patch_embed'`.

The parameters are those of the whole detector. The MAdds are those of backbone and neck, because
the head does not change, on one image of {size}×{size} pixels. They are counted by MMEngine's
`FlopAnalyzer`: products in convolutions, in norms and in matrix products, such as the mixing of
the kernel banks, but no element-wise products. For K = 4 and 224×224 pixels, the paper's figures
say that ODConv adds more than this way of counting does. A backbone has no classifier here:

| backbone | paper, plain → ODConv | this way of counting |
|---|---|---|
| ResNet-18 | 1.814 → 1.916 G | 1.819 → 1.863 G |
| ResNet-50 | 3.858 → 4.080 G | 4.109 → 4.195 G (mmdet strides in the 3×3 convolution) |
| MobileNetV2 | 300.8 → 327.1 M | 312.9 → 323.0 M |
"""
AFTER = """\
*Kept* counts the convolutions that stay plain in the part that is converted, and the special ones
outside that part. `print(report)` shows their names. Other convolutions outside are not counted.
"""
HEADER = (
    '| {} | config | converted | kept | parameters (M) | MAdds (G) |\n|---|---|---|---|---|---|\n'
)


@dataclass
class Row:
    """One line of the table: a detector before and after its conversion."""

    family: str
    config: str
    converted: int
    kept: dict[str, int]
    parameters: tuple[float, float]
    madds: tuple[float, float]

    def __str__(self) -> str:
        kept = ', '.join(f'{n} {why}' for why, n in self.kept.items() if why != 'not included')
        parameters = ' → '.join(f'{value / 1e6:.1f}' for value in self.parameters)
        madds = ' → '.join(f'{value / 1e9:.2f}' for value in self.madds)
        config = Path(self.config).stem
        return f'| {self.family} | {config} | {self.converted} | {kept} | {parameters} | {madds} |'


class Features(nn.Module):
    """Backbone and neck of a detector."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.detector.extract_feat(images))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=Path('docs/zoo.md'), help='the table')
    parser.add_argument('--kernel-num', type=cli.positive, default=4, help='K')
    parser.add_argument(
        '--size', type=cli.positive, default=320, help='pixels of the image for MAdds'
    )
    return parser.parse_args()


def count_madds(detector: nn.Module, size: int) -> float:
    """Multiply-adds of the detector's backbone and neck on one square image."""
    analyzer = FlopAnalyzer(Features(detector).eval(), torch.zeros(1, 3, size, size))
    analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analyzer.total()


def convert(family: str, config: str, kernel_num: int, size: int) -> Row:
    """Build, count, convert and count again."""
    # Without processes to synchronise with, a SyncBN is a BN; on a CPU it would not run.
    detector = revert_sync_batchnorm(MODELS.build(get_config(f'mmdet::{config}').model))
    before = count_madds(detector, size)
    report = convert_to_odconv(
        detector, kernel_num=kernel_num, include=INCLUDE.get(family, 'backbone')
    )
    return Row(
        family,
        config,
        len(report.converted),
        report.reasons(),
        (report.parameters_before, report.parameters_after),
        (before, count_madds(detector, size)),
    )


def main() -> None:
    args = parse_args()
    register_all_modules()
    logging.getLogger('mmengine').setLevel(logging.ERROR)
    lines = [PROSE.format(kernel_num=args.kernel_num, size=args.size)]
    for title, zoo in (('detector', DETECTORS), ('backbone', BACKBONES)):
        lines.append(HEADER.format(title).rstrip())
        for family, config in zoo.items():
            row = convert(family, config, args.kernel_num, args.size)
            print(row, flush=True)
            lines.append(str(row))
        lines.append('')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text('\n'.join([*lines, AFTER]), encoding='utf-8')
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
