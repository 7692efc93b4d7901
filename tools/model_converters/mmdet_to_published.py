#!/usr/bin/env python
"""Write the weights of an ODConv checkpoint under the published names."""

import argparse

import torch

from mmdet_odconv import cli
from mmdet_odconv.conversion.published import rename_to_published, state_dict_of


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkpoint', help='checkpoint of a detector or of a backbone')
    parser.add_argument('out', help='file to write')
    cli.add_force(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    checkpoint = cli.require_checkpoint(args.checkpoint)
    cli.require_new_file(args.out, args.force)
    try:
        state_dict = rename_to_published(state_dict_of(checkpoint.content))
    except ValueError as error:
        raise SystemExit(f'{args.checkpoint}: {error}') from error
    torch.save({'state_dict': state_dict}, args.out)
    print(f'wrote {args.out} ({len(state_dict)} entries)')


if __name__ == '__main__':
    main()
