#!/usr/bin/env python
"""Turn a published ODConv checkpoint into one for MMDetection 3, checked against a config.

A published detector becomes a checkpoint of the whole detector, for tools/test.py. An ImageNet
classifier becomes one of the backbone alone, for
``backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=OUT))``. Static weights of a ResNet or
MobileNetV2 under torchvision's names are taken too: banks of the same function come out.
"""

import argparse

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules

from mmdet_odconv import cli, load_published_checkpoint
from mmdet_odconv.conversion.published import state_dict_of


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('checkpoint', help='published checkpoint')
    parser.add_argument('config', help='config file of the detector')
    parser.add_argument('out', help='file to write')
    cli.add_force(parser)
    cli.add_config_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    checkpoint = cli.require_checkpoint(args.checkpoint)
    config = cli.load_config(args.config, args.cfg_options)
    cli.require_new_file(args.out, args.force)
    register_all_modules()
    model = MODELS.build(config.model)
    try:
        names = state_dict_of(checkpoint.content)
        load_published_checkpoint(model, checkpoint.content)
    except (RuntimeError, ValueError) as error:
        raise SystemExit(f'{args.checkpoint}: {error}') from error

    whole = any('backbone.' in name for name in names)
    meta = {}
    if 'CLASSES' in checkpoint.meta:
        meta['dataset_meta'] = {'classes': tuple(checkpoint.meta['CLASSES'])}
    state_dict = model.state_dict() if whole else model.backbone.state_dict()
    torch.save({'state_dict': state_dict, 'meta': meta}, args.out)
    print(f'wrote {args.out} ({"detector" if whole else "backbone"}, {len(state_dict)} entries)')


if __name__ == '__main__':
    main()
