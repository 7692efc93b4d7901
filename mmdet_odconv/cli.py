"""What the command-line tools share: reading a config, and saying clearly what is missing.

A user's mistake (a path, a name, a value) ends a tool with one sentence and exit status 1.
"""

import argparse
import difflib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import Tensor, nn

from .checkpoint import CheckpointFileError, not_finite, read_checkpoint
from .conversion.errors import ConversionError
from .layers.odconv import _ODConvNd

IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
DATALOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def add_runner_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that mmdet's train.py and test.py have in common."""
    parser.add_argument('--work-dir', help='folder for logs, checkpoints and metrics')
    add_config_options(parser)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options``."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='overrides of the config, key=value each; a list is key="[a,b]" or key=a,b, and '
        'nests, as in key="[(a,b),(c,d)]": quote it and leave no blanks',
    )


def load_config(path: str, options: dict[str, Any] | None = None) -> Config:
    """Read a config and apply the overrides of the command line.

    Raises:
        SystemExit: There is no such file (the message names near ones), a base of it is missing,
            or an override does not fit the config.
    """
    require_file(path, 'config')
    try:
        config = Config.fromfile(path)
    except FileNotFoundError as error:
        raise SystemExit(f'{path}: {error}') from error
    if options:
        try:
            config.merge_from_dict(options)
        except (KeyError, TypeError, IndexError) as error:
            raise SystemExit(f'--cfg-options {options} does not fit {path}: {error}') from error
    return config


def runner_config(args: argparse.Namespace) -> Config:
    """The config named by ``args``, with launcher and work folder set.

    The work folder is the argument's, else the config's, else ./work_dirs/<config name>.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    config = load_config(args.config, args.cfg_options)
    config.launcher = args.launcher
    if args.work_dir is not None:
        config.work_dir = args.work_dir
    elif config.get('work_dir') is None:
        config.work_dir = os.path.join('./work_dirs', Path(args.config).stem)
    return config


def build_runner(config: Config) -> Runner:
    """The runner that the config asks for.

    Raises:
        SystemExit: An argument of ``model.odconv`` is wrong; the message has near names.
    """
    try:
        return RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)
    except ConversionError as error:
        raise SystemExit(f'model.odconv: {error}') from error


def require_file(path: str, what: str) -> None:
    """End the program unless ``path`` is a file, or lies elsewhere than on this disk.

    Args:
        path (str): A path; one with a scheme (``https://``, ``torchvision://``, ``s3://``) is
            left to mmengine.
        what (str): What the file is, for the message.

    Raises:
        SystemExit: There is no such file; the message has the path looked for and near names.
    """
    if '://' in path or Path(path).expanduser().is_file():
        return
    raise SystemExit(_not_found(path, what))


def _not_found(path: str, what: str) -> str:
    message = f'{what} not found: {path} (looked for {Path(path).absolute()})'
    folder = Path(path).parent
    if folder.is_dir():
        names = sorted(entry.name for entry in folder.iterdir())
        near = difflib.get_close_matches(Path(path).name, names, n=3)
        if near:
            message += f'; is it {" or ".join(str(folder / name) for name in near)}?'
    return message


def require_checkpoint(path: str) -> dict[str, Any]:
    """Read a checkpoint, and end the program unless that is possible without running its code.

    Args:
        path (str): The checkpoint, as MMEngine takes it.

    Raises:
        SystemExit: The message names the file and the cause.
    """
    try:
        return read_checkpoint(path)
    except CheckpointFileError as error:
        raise SystemExit(str(error)) from error


def require_weights(model: nn.Module, path: str) -> None:
    """End the program unless a checkpoint has all the weights of a model.

    MMEngine itself only logs what does not fit, and a model with random weights in some of its
    layers then has an AP of 0, or draws nothing. The weights are loaded; what the checkpoint has
    beyond them does not matter. A static kernel fits a bank.

    Args:
        model (nn.Module): The detector, without wrappers.
        path (str): The checkpoint, as MMEngine takes it.

    Raises:
        SystemExit: The file cannot be read, or entries are missing, have other shapes or values
            that are not finite. The message names the first of them, and both numbers of kernels
            or of classes.
    """
    content = require_checkpoint(path)
    state_dict = content.get('state_dict', content)
    entries = {name.removeprefix('module.'): value for name, value in state_dict.items()}
    complaints = _other_shapes(model, entries)
    broken = not_finite(model, entries)
    if broken:
        complaints.append(
            f'{len(broken)} of its weights have values that are not finite, such as {broken[0]}'
        )
    if not complaints:
        own: Any = type(state_dict)(entries)
        if hasattr(state_dict, '_metadata'):
            own._metadata = state_dict._metadata
        missing = model.load_state_dict(own, strict=False).missing_keys
        if missing:
            number = len(model.state_dict())
            complaints = [
                f'{len(missing)} of the {number} weights of the model are not in the file, such as '
                f'{missing[0]}'
            ]
    if complaints:
        raise SystemExit(f'{path} does not fit the config: {"; ".join(complaints)}')


def _other_shapes(model: nn.Module, entries: dict[str, Any]) -> list[str]:
    """What has one shape in the file and another in the model, banks of another K apart."""
    banks = {
        f'{name}.weight' if name else 'weight'
        for name, module in model.named_modules()
        if isinstance(module, _ODConvNd)
    }
    kernel_nums: Counter[tuple[int, int]] = Counter()
    others = []
    for name, ours in model.state_dict().items():
        theirs = entries.get(name)
        if not isinstance(theirs, Tensor) or theirs.shape == ours.shape:
            continue
        if name in banks and theirs.shape == ours.shape[1:]:
            continue
        if name in banks and theirs.shape[1:] == ours.shape[1:]:
            kernel_nums[len(theirs), len(ours)] += 1
        elif not name.endswith(('attention.kernel_fc.weight', 'attention.kernel_fc.bias')):
            others.append(
                f'{name} has shape {tuple(theirs.shape)} in the file, {tuple(ours.shape)} in the '
                'config'
            )
    complaints = [
        f'{number} banks have K={theirs} in the file, K={ours} in the config'
        for (theirs, ours), number in kernel_nums.items()
    ]
    if others:
        more = f' (and {len(others) - 1} more like it)' if len(others) > 1 else ''
        complaints.append(others[0] + more)
    return complaints


def add_force(parser: argparse.ArgumentParser) -> None:
    """Add ``--force``, which :func:`require_new_file` obeys."""
    parser.add_argument('--force', action='store_true', help='overwrite an existing output file')


def require_new_file(path: str, force: bool) -> None:
    """End the program if writing ``path`` would destroy a file or cannot succeed.

    Args:
        path (str): The file that is to be written.
        force (bool): Whether an existing file may be overwritten.

    Raises:
        SystemExit: The file exists and ``force`` is off, or its folder does not exist.
    """
    if Path(path).exists() and not force:
        raise SystemExit(f'{path} exists; --force overwrites it')
    if not Path(path).absolute().parent.is_dir():
        raise SystemExit(f'the folder of {path} does not exist')


def require_packages(*names: str) -> None:
    """End the program unless these optional packages are installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise SystemExit(
            f'not installed: {", ".join(missing)}; pip install -r requirements/deploy.txt'
        )


def find_images(path: str) -> list[Path]:
    """The image ``path``, or those in the folder ``path``, in the order of their names.

    Raises:
        SystemExit: There is no such file, or no image in the folder.
    """
    if not Path(path).is_dir():
        require_file(path, 'image')
        return [Path(path)]
    images = sorted(p for p in Path(path).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise SystemExit(f'no image ({", ".join(IMAGE_SUFFIXES)}) in {Path(path).absolute()}')
    return images


def require_datasets(config: Config, dataloaders: Sequence[str] = DATALOADERS) -> None:
    """End the program unless the data sets are there and have the classes of the detector.

    Of wrong classes mmdet itself says nothing: it leaves objects out, or ends with an index error
    in the first validation.

    Args:
        config (Config): A whole config.
        dataloaders (Sequence[str]): The data loaders to look at. Default: all three.

    Raises:
        SystemExit: A file or folder is missing (the message has the path looked for), a class is
            none of the annotation file's, or a head has another number of classes.
    """
    for name in dataloaders:
        for key, dataset in _datasets(config.get(name), name):
            _require_files(key, dataset)
            _require_classes(key, dataset, config.get('model') or {})


def _datasets(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """The data-set configs with files of their own in a data-loader config, wrapped ones too.

    Each comes with its dotted key.
    """
    if isinstance(node, dict):
        if 'ann_file' in node:
            # With a file backend of its own (an object store, say) the files are not on this disk.
            if not node.get('backend_args'):
                yield key, node
        else:
            for child in ('dataset', 'datasets'):
                yield from _datasets(node.get(child), f'{key}.{child}')
    elif isinstance(node, (list, tuple)):
        for i, item in enumerate(node):
            yield from _datasets(item, f'{key}.{i}')


def _require_files(key: str, dataset: Any) -> None:
    root = dataset.get('data_root') or ''
    wanted = [('annotation file', dataset.ann_file)]
    wanted += [('image folder', p) for p in (dataset.get('data_prefix') or {}).values()]
    for what, path in wanted:
        full = os.path.join(root, path or '')
        if path and '://' not in full and not os.path.exists(full):
            raise SystemExit(
                f'{_not_found(full, f"{what} of {key}")}; put the data there, or set data_root, '
                f'ann_file and data_prefix of {key} (README, "Data")'
            )


def _require_classes(key: str, dataset: Any, model: Any) -> None:
    kind = DATASETS.get(dataset.type) if isinstance(dataset.get('type'), str) else None
    if kind is None or not issubclass(kind, CocoDataset):
        return
    own = dataset.get('metainfo') or {}
    metainfo = own or kind.METAINFO
    classes = metainfo.get('thing_classes') or metainfo.get('classes')
    if not isinstance(classes, (list, tuple)):  # the name of a file that has them
        return
    for head, number in _class_numbers(model, 'model'):
        if number != len(classes):
            raise SystemExit(
                f'{head}.num_classes is {number}, but {key} has {_counted(classes)}; '
                f'set {head}.num_classes, or the names in {key}.metainfo.classes'
            )
    path = os.path.join(dataset.get('data_root') or '', dataset.ann_file)
    if own and os.path.isfile(path):
        categories = [c['name'] for c in json.loads(Path(path).read_text())['categories']]
        for name in classes:
            if name not in categories:
                raise SystemExit(
                    f'{key}.metainfo.classes has {name!r}, but {path} has {_counted(categories)}'
                )


def _class_numbers(model: Any, key: str) -> Iterator[tuple[str, int]]:
    """The ``num_classes`` of the box heads in a model's config, with the keys of the heads."""
    if isinstance(model, (list, tuple)):
        for i, item in enumerate(model):
            yield from _class_numbers(item, f'{key}.{i}')
    # Detectors that read text have an output for each word, not for each class.
    elif isinstance(model, dict) and 'language_model' not in model:
        if '.bbox_head' in key and 'num_classes' in model:
            yield key, model['num_classes']
        else:
            for name, child in model.items():
                yield from _class_numbers(child, f'{key}.{name}')


def _counted(names: Sequence[str]) -> str:
    shown = ', '.join(names[:5]) + (', …' if len(names) > 5 else '')
    return f'{len(names)} classes ({shown})'
