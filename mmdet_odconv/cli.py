"""What the command-line tools share: reading a config, and saying clearly what is missing.

A user's mistake (a path, a name, a value) ends a tool with one sentence and exit status 1.
"""

import argparse
import difflib
import json
import os
import platform
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import mmengine
import torch
from mmdet.apis import init_detector
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.dist import all_gather_object
from mmengine.registry import MODEL_WRAPPERS, RUNNERS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import (
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .analysis import odconv_layers
from .checkpoint import Checkpoint, CheckpointFileError, not_finite, read_checkpoint
from .conversion.errors import ConversionError
from .functional.arguments import ArgumentError
from .layers.odconv import _ODConvNd

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
        SystemExit: There is no such file (the message names near ones), a base of it or the
            package of a base is missing, it is not written in Python's syntax, or an override
            does not fit the config.
    """
    require_file(path, 'config')
    try:
        config = Config.fromfile(path)
    except ModuleNotFoundError as error:
        message = f'{path}: {error}'
        if 'mmpretrain' in str(error):
            message += '; pip install -r requirements/pretrain.txt'
        raise SystemExit(message) from error
    except (FileNotFoundError, SyntaxError) as error:
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


def shorten_report(config: Config) -> None:
    """Leave the table of the conversion to training, where it is news; here one line will do."""
    if config.model.get('type') == 'ODConvModel':
        config.model.report = 'summary'


def build_runner(config: Config) -> Runner:
    """The runner that the config asks for.

    Raises:
        SystemExit: The work folder cannot be written, an argument of ``model.odconv`` or of an
            ODConv layer is wrong (the message has near names), or there are several processes on
            this machine without a GPU, and the config does not say that they use CPUs.
    """
    _require_writable(config.work_dir)
    try:
        with _processes_on_cpus(config):
            return RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)
    except ConversionError as error:
        raise SystemExit(f'model.odconv: {error}') from error
    except ArgumentError as error:
        raise SystemExit(f'the ODConv layers of the config: {error}') from error


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


def _require_writable(folder: str) -> None:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SystemExit(
            f'the work folder {folder} cannot be written ({error.strerror}); set another by '
            '--work-dir'
        ) from error


def require_file(path: str, what: str) -> None:
    """End the program unless ``path`` is a file, or lies elsewhere than on this disk.

    A checkpoint of DeepSpeed is a folder, of which the message says how to make a file.

    Args:
        path (str): A path; one with a scheme (``https://``, ``torchvision://``, ``s3://``) is
            left to mmengine.
        what (str): What the file is, for the message.

    Raises:
        SystemExit: There is no such file; the message has the path looked for and near names.
    """
    if '://' in path or Path(path).expanduser().is_file():
        return
    if Path(path).is_dir():
        raise SystemExit(f'{path} is a folder, where the {what} should be a file{_inside(path)}')
    raise SystemExit(not_found(path, what))


def _inside(folder: str) -> str:
    """What a folder has that its user may have meant."""
    script = Path(folder) / 'zero_to_fp32.py'
    if script.is_file():
        return (
            f". It is a checkpoint of DeepSpeed; 'python {script} {folder} weights.pth' makes a "
            'file of its weights'
        )
    last = Path(folder) / 'last_checkpoint'
    if last.is_file():
        return f'; is it {os.fsdecode(last.read_bytes()).strip()}?'
    files = sorted(path for path in Path(folder).glob('*.pth') if path.is_file())
    return f'; is it {files[-1]}?' if files else ''


def not_found(path: str, what: str) -> str:
    """A sentence that says where a file or folder was looked for, and has near names.

    Args:
        path (str): The path.
        what (str): What there should be.
    """
    message = f'{what} not found: {path}'
    if not Path(path).is_absolute():
        message += f' (looked for {Path(path).absolute()})'
    folder = Path(path).parent
    if folder.is_dir():
        names = sorted(entry.name for entry in folder.iterdir())
        near = difflib.get_close_matches(Path(path).name, names, n=3)
        if near:
            message += f'; is it {" or ".join(str(folder / name) for name in near)}?'
    return message


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


def require_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """End the program unless a checkpoint has all the weights of a model.

    MMEngine itself only logs what does not fit, and a model with random weights in some of its
    layers then has an AP of 0, or draws nothing. The weights are loaded; what the checkpoint has
    beyond them does not matter. A static kernel fits a bank.

    Args:
        model (nn.Module): The detector, without wrappers.
        checkpoint (Checkpoint): The checkpoint.

    Raises:
        SystemExit: Entries are missing, have other shapes or values that are not finite. The
            message names the first of them, and both numbers of kernels or of classes.
    """
    state_dict = checkpoint.content.get('state_dict', checkpoint.content)
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
        raise SystemExit(f'{checkpoint.path} does not fit the config: {"; ".join(complaints)}')


def load_detector(config: Config, path: str, device: str = 'cpu') -> nn.Module:
    """mmdet's ``init_detector``, for checkpoints that fit alone.

    Args:
        config (Config): A whole config.
        path (str): The checkpoint, as MMEngine takes it.
        device (str): Where the detector is to be. Default: 'cpu'.

    Raises:
        SystemExit: As of :func:`require_checkpoint` and :func:`require_weights`.
    """
    checkpoint = require_checkpoint(path)
    shorten_report(config)
    # With options, if empty ones, mmdet does not look for a backbone in the config of ODConvModel.
    model = init_detector(config, path, device=device, cfg_options={})
    require_weights(model, checkpoint)
    return model


def require_same_start(checkpoint: Checkpoint | None) -> None:
    """End the program unless all processes go on from the same checkpoint, or all start anew.

    Args:
        checkpoint (Checkpoint, optional): What this process goes on from, None if it starts anew.

    Raises:
        SystemExit: In all processes; the message has the hosts and checkpoints of two that differ.
    """
    where, meta = f'anew on {platform.node()}', {}
    if checkpoint is not None:
        meta = checkpoint.meta
        where = f'from {checkpoint.path} (iteration {meta.get("iter")}) on {platform.node()}'
    starts = all_gather_object((meta.get('iter'), meta.get('time'), where))
    for *start, other in starts:
        if start != list(starts[0][:2]):
            raise SystemExit(
                f'the processes would not go on from the same place, but {starts[0][2]} and '
                f'{other}: --work-dir must be a folder that all hosts share, or each host needs a '
                'copy of the same checkpoint'
            )


def require_start_weights(model: nn.Module) -> None:
    """End the program unless the weights that an ``init_cfg`` starts the training from can be had.

    Args:
        model (nn.Module): The detector; wrapped ones too.

    Raises:
        SystemExit: A file cannot be loaded, say because there is no network. The message has the
            file to fetch and the option to set.
    """
    for name, module in model.named_modules():
        key = 'model' + f'.{name}'.removesuffix('.').removeprefix('.module')
        given = getattr(module, 'init_cfg', None)
        for init_cfg in given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
                without = f'{key}.init_cfg=None'
                if getattr(module, 'frozen_stages', -1) >= 0:
                    without += f' {key}.frozen_stages=-1 {key}.norm_eval=False'
                _require_loadable(init_cfg['checkpoint'], f'{key}.init_cfg.checkpoint', without)


def _require_loadable(path: str, option: str, without: str) -> None:
    if '://' not in path and not Path(path).exists():
        raise SystemExit(f'{not_found(path, option)}; to start without it set {without}')
    try:
        read_checkpoint(path)
    except CheckpointFileError as error:  # no network and no torchvision, too
        address = _address(path)
        fetch = f'fetch {address} and set' if address else 'set'
        raise SystemExit(
            f'{option}: {error}; {fetch} --cfg-options {option}=FILE, '
            f'or start without these weights by --cfg-options {without}'
        ) from error


def _address(path: str) -> str | None:
    """Where on the web the file is that MMEngine means by ``path``."""
    scheme, _, name = path.partition('://')
    name = get_deprecated_model_names().get(name, name)
    if scheme in ('http', 'https'):
        return path
    if scheme in ('torchvision', 'modelzoo'):
        addresses = Path(mmengine.__path__[0]) / 'hub/torchvision_0.12.json'
        known = json.loads(addresses.read_text(encoding='utf-8'))
        return known.get(name.lower())
    if scheme in ('open-mmlab', 'openmmlab'):
        return get_external_models().get(name)
    return get_mmcls_models().get(name) if scheme == 'mmcls' else None


def require_odconv_layers(model: nn.Module, config: str) -> None:
    """End the program if the model of a config has no ODConv layer to analyse."""
    try:
        odconv_layers(model)
    except ValueError as error:
        raise SystemExit(f'{config}: {error}') from error


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
        SystemExit: There is no such file, no image in the folder, or a file that is none: a
            single one is decoded, of those in a folder the first bytes are read.
    """
    if not Path(path).is_dir():
        require_file(path, 'image')
        if cv2.imread(path) is None:
            raise SystemExit(f'cannot be read as an image: {path}')
        return [Path(path)]
    images = sorted(p for p in Path(path).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise SystemExit(f'no image ({", ".join(IMAGE_SUFFIXES)}) in {Path(path).absolute()}')
    for image in images:
        if not cv2.haveImageReader(str(image)):
            raise SystemExit(f'cannot be read as an image: {image}')
    return images
