"""What the command-line tools share: arguments, configs, files and weights.

A user's mistake (a path, a name, a value) ends a tool with one sentence and exit status 1.
"""

import argparse
import inspect
import math
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import torch
from mmdet.apis import init_detector
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.registry import MODEL_WRAPPERS, RUNNERS
from mmengine.runner import Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .analysis import odconv_layers
from .conversion import build_odconv_model
from .deployment import collapse_static_layers
from .safe_running import (
    Checkpoint,
    CheckpointFileError,
    config_errors_as_exit,
    read_checkpoint,
    require_datasets,
    require_weights,
    unwrapped,
)
from .safe_running.dataset_checks import not_found

IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')


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


class _Options(DictAction):
    """MMEngine's action, which fails without a word on an option that has no value."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        for value in values:
            if '=' not in value:
                parser.error(f'{option_string} takes key=value, got {value!r}')
        super().__call__(parser, namespace, values, option_string)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options``."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_Options,
        help='overrides of the config, key=value each; a list is key="[a,b]" or key=a,b, and '
        'nests, as in key="[(a,b),(c,d)]": quote it and leave no blanks',
    )


def add_collapse(parser: argparse.ArgumentParser) -> None:
    """Add ``--collapse-static``, which :func:`collapse_static` obeys."""
    parser.add_argument(
        '--collapse-static',
        type=positive,
        nargs='?',
        const=64,
        metavar='N',
        help='replace dynamic layers whose attentions hardly depend on the image, over the first '
        'N images of the test set (default: 64), by plain convolutions',
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    """Add ``--force``, which :func:`require_new_file` obeys."""
    parser.add_argument('--force', action='store_true', help='overwrite an existing output file')


def positive(text: str) -> int:
    """A whole number of at least one, as the type of an argument."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f'must be a whole number of at least 1, got {text}')
    return int(text)


def load_config(path: str, options: dict[str, Any] | None = None) -> Config:
    """Read a config and apply the overrides of the command line.

    Raises:
        SystemExit: There is no such file, a base of it or the package of a base is missing, it does
            not run as Python, or an override does not fit the config.
    """
    require_file(path, 'config')
    try:
        config = Config.fromfile(path)
    except ModuleNotFoundError as error:
        message = f'{path}: {error}'
        if 'mmpretrain' in str(error):
            message += '; pip install -r requirements/pretrain.txt'
        raise SystemExit(message) from error
    except Exception as error:  # a config is a program, with the errors of any
        raise SystemExit(f'{path}: {type(error).__name__}: {error}') from error
    for option in options or {}:
        # MMEngine would add a key that nothing reads, for `odconv.kernel_num` without `model`.
        first, _, rest = option.partition('.')
        if rest and first not in {*config, *inspect.signature(Runner.__init__).parameters}:
            raise SystemExit(f'--cfg-options {option}: {path} has no {first}')
    try:
        config.merge_from_dict(options or {})
    except (KeyError, TypeError, IndexError) as error:
        raise SystemExit(f'--cfg-options {options} does not fit {path}: {error}') from error
    return config


def runner_config(args: argparse.Namespace, *needed: str) -> Config:
    """The config named by ``args``, with launcher and work folder set.

    The work folder is the argument's, else the config's, else ./work_dirs/<config name>.

    Args:
        args (argparse.Namespace): Has the arguments of :func:`add_runner_arguments`.
        *needed (str): What the runner reads besides the model, such as 'train_dataloader'.

    Raises:
        SystemExit: As in :func:`load_config`, or the config lacks one of these.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    config = load_config(args.config, args.cfg_options)
    missing = [name for name in ('model', *needed) if config.get(name) is None]
    if missing:
        raise SystemExit(f'{args.config} has no {" and no ".join(missing)}')
    config.launcher = args.launcher
    if args.work_dir is not None:
        config.work_dir = args.work_dir
    elif config.get('work_dir') is None:
        config.work_dir = os.path.join('./work_dirs', Path(args.config).stem)
    return config


def shorten_report(config: Config) -> None:
    """Leave the table of the conversion to training, where it is news; here one line will do."""
    if config.model.get('type') in ('ODConvModel', build_odconv_model):
        config.model.report = 'summary'


def build_runner(config: Config) -> Runner:
    """The runner that the config asks for.

    Raises:
        SystemExit: The work folder cannot be written, the config has a mistake
            (:func:`config_errors_as_exit`), or there are several processes on this machine without
            a GPU, and the config does not say that they use CPUs.
    """
    require_writable(config.work_dir, 'work folder', '--work-dir')
    with config_errors_as_exit(config), _processes_on_cpus(config):
        return RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)


@contextmanager
def _processes_on_cpus(config: Config) -> Iterator[None]:
    """Let MMEngine start a distributed run on CPUs, where it would choose a GPU all the same."""
    if config.get('launcher', 'none') == 'none' or get_device() != 'cpu':
        yield
        return
    backend = (config.get('env_cfg') or {}).get('dist_cfg', {}).get('backend', 'nccl')
    if backend not in ('gloo', 'mpi'):
        raise SystemExit(
            f'{platform.node()} has no GPU that PyTorch can use, which the backend {backend} of '
            'several processes needs; --cfg-options env_cfg.dist_cfg.backend=gloo uses CPUs'
        )
    wrapper = config.get('model_wrapper_cfg') or dict(
        broadcast_buffers=False, find_unused_parameters=config.get('find_unused_parameters', False)
    )
    kind = MODEL_WRAPPERS.get(wrapper.get('type', 'MMDistributedDataParallel'))
    if issubclass(kind, DistributedDataParallel):
        config.model_wrapper_cfg = dict(wrapper, device_ids=None)
    choose, torch.cuda.set_device = torch.cuda.set_device, lambda device: None
    try:
        yield
    finally:
        torch.cuda.set_device = choose


def require_file(path: str, what: str) -> None:
    """End the program unless ``path`` is a file, or lies elsewhere than on this disk.

    Args:
        path (str): A path; one with a scheme (``https://``, ``torchvision://``, ``s3://``) is
            left to mmengine.
        what (str): What the file is, for the message.

    Raises:
        SystemExit: There is no such file; the message has the path looked for.
    """
    if '://' in path or Path(path).expanduser().is_file():
        return
    if Path(path).is_dir():
        raise SystemExit(f'{path} is a folder, where the {what} should be a file')
    raise SystemExit(not_found(path, what))


def require_writable(folder: str, what: str, option: str) -> None:
    """Make a folder, and end the program unless files can be written to it.

    Args:
        folder (str): The folder.
        what (str): What it is, for the message.
        option (str): The option that sets another.

    Raises:
        SystemExit: It cannot be made, or not be written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SystemExit(
            f'the {what} {folder} cannot be written ({error.strerror}); set another by {option}'
        ) from error


def require_new_file(path: str, force: bool) -> None:
    """End the program if writing ``path`` would destroy a file or cannot succeed.

    Args:
        path (str): The file that is to be written.
        force (bool): Whether an existing file may be overwritten.

    Raises:
        SystemExit: The file exists and ``force`` is off, it is a folder, or its own folder does
            not exist or cannot be written to.
    """
    if Path(path).is_dir():
        raise SystemExit(f'{path} is a folder, where a file is to be written')
    if Path(path).exists() and not force:
        raise SystemExit(f'{path} exists; --force overwrites it')
    try:
        with tempfile.TemporaryFile(dir=Path(path).absolute().parent):
            pass
    except OSError as error:
        raise SystemExit(f'{path} cannot be written ({error.strerror})') from error


def require_packages(*names: str, install: str = '-r requirements/onnx.txt') -> None:
    """End the program unless these optional packages are installed, and say what to install."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise SystemExit(f'not installed: {", ".join(missing)}; pip install {install}')


def find_images(path: str) -> list[Path]:
    """The image ``path``, or those in the folder ``path``, in the order of their names.

    Raises:
        SystemExit: There is no such file, no image in the folder, or a file that does not begin as
            an image does.
    """
    images = [Path(path)]
    if Path(path).is_dir():
        images = sorted(p for p in Path(path).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    else:
        require_file(path, 'image')
    if not images:
        raise SystemExit(f'no image ({", ".join(IMAGE_SUFFIXES)}) in {Path(path).absolute()}')
    for image in images:
        if not cv2.haveImageReader(str(image)):
            raise SystemExit(f'cannot be read as an image: {image}')
    return images


def require_checkpoint(path: str) -> Checkpoint:
    """Read a checkpoint, and end the program unless that is possible without running its code.

    The tools call this before MMEngine opens the file, which with some versions runs that code.

    Args:
        path (str): The checkpoint, as MMEngine takes it.

    Raises:
        SystemExit: The message names the file and the cause.
    """
    require_file(path, 'checkpoint')
    try:
        return read_checkpoint(path)
    except CheckpointFileError as error:
        raise SystemExit(str(error)) from error


def require_start_weights(model: nn.Module) -> None:
    """End the program unless the weights that an ``init_cfg`` starts the training from can be had.

    Args:
        model (nn.Module): The detector; wrapped ones too.

    Raises:
        SystemExit: A file cannot be loaded, say because there is no network.
    """
    for name, module in model.named_modules():
        key = 'model' + f'.{name}'.removesuffix('.').removeprefix('.module')
        given = getattr(module, 'init_cfg', None)
        for init_cfg in given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
                try:
                    read_checkpoint(init_cfg['checkpoint'])
                except CheckpointFileError as error:
                    how = getattr(module, 'how_to_get_weights', None)
                    raise SystemExit(
                        f'{key}.init_cfg.checkpoint: {error}; name another file, or start without '
                        f'by --cfg-options {key}.init_cfg=None, with {key}.frozen_stages=-1 if '
                        f'stages are frozen' + (f'; {how()}' if how else '')
                    ) from error


def load_detector(
    config: Config, checkpoint: str, device: str = 'cpu', odconv: bool = False
) -> nn.Module:
    """The detector of a config with all its weights from a checkpoint, in evaluation mode.

    Args:
        config (Config): A whole config.
        checkpoint (str): The checkpoint, as MMEngine takes it.
        device (str): Where the detector goes. Default: 'cpu'.
        odconv (bool): Whether it has to have an ODConv layer. Default: False.

    Raises:
        SystemExit: The device, the file or the layer is not there, or the config and the checkpoint
            do not fit each other.
    """
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition('\n')[0]
        raise SystemExit(f'--device {device} cannot be used: {reason}') from error
    content = require_checkpoint(checkpoint)
    shorten_report(config)
    with config_errors_as_exit(config):
        # With options, if empty, mmdet does not look for a backbone in an ODConvModel's config.
        model = init_detector(config, checkpoint, device=device, cfg_options={})
    if odconv:
        require_odconv_layers(model, config.filename)
    require_weights(model, content)
    return model


def require_odconv_layers(model: nn.Module, config: str) -> None:
    """End the program if the model of a config has no ODConv layer to analyse."""
    try:
        odconv_layers(model)
    except ValueError as error:
        raise SystemExit(f'{config}: {error}') from error


def collapse_static(model: nn.Module, config: Config, number: int) -> None:
    """Make the dynamic layers of a detector plain that do not move, and print the report.

    Args:
        model (nn.Module): The detector with its weights; wrapped ones too.
        config (Config): Its config, whose test set has the images.
        number (int): How many images to look at.

    Raises:
        SystemExit: The test set is not there, or the detector has no dynamic layer.
    """
    require_odconv_layers(model, config.filename)
    require_datasets(config, ('test_dataloader',))
    with config_errors_as_exit(config):
        loader = Runner.build_dataloader(config.test_dataloader)
        batches = islice(loader, math.ceil(number / (loader.batch_size or 1)))
        report = collapse_static_layers(model, batches, forward=partial(_raw_outputs, model))
    print_log(str(report), logger='current')


def _raw_outputs(model: Any, batch: Any) -> Any:
    """What the detector computes before its boxes are decoded."""
    detector: Any = unwrapped(model)
    return detector(**detector.data_preprocessor(batch, False), mode='tensor')
