"""What the command-line tools share: reading a config, and saying clearly what is missing.

A user's mistake (a path, a name, a value) ends a tool with one sentence and exit status 1.
"""

import argparse
import ast
import difflib
import inspect
import json
import os
import platform
import re
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import mmengine
import torch
from mmdet.apis import init_detector
from mmengine import registry
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.dist import all_gather_object
from mmengine.registry import MODEL_WRAPPERS, RUNNERS, Registry
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

# What starts the processes of each launcher, and a variable that it sets.
_STARTED_BY = dict(
    pytorch=('torchrun, as in tools/dist_train.sh', 'RANK'),
    slurm=('srun, as in tools/slurm_train.sh', 'SLURM_PROCID'),
    mpi=('mpirun', 'OMPI_COMM_WORLD_LOCAL_RANK'),
)
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


def load_config(path: str, options: dict[str, Any] | None = None) -> Config:
    """Read a config and apply the overrides of the command line.

    Raises:
        SystemExit: There is no such file (the message names near ones), a base of it or the
            package of a base is missing, it does not run as Python, it misspells a key, or an
            override does not fit the config or is nearly one of its keys.
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
    _require_no_misspelt_key(path)
    if options:
        for option in options:
            _require_no_near_key(config, option, path)
        try:
            config.merge_from_dict(options)
        except (KeyError, TypeError, IndexError) as error:
            raise SystemExit(f'--cfg-options {options} does not fit {path}: {error}') from error
    return config


def _runner_keys() -> set[str]:
    """The keys of a config that a runner reads."""
    return {*inspect.signature(Runner.__init__).parameters, 'custom_imports', 'model_wrapper_cfg'}


def _require_no_misspelt_key(path: str) -> None:
    """End the program if a config sets a name that nothing reads and that is nearly a key.

    MMEngine keeps such a name, and the training goes on with the default of the right key.
    """
    if not path.endswith('.py') or '://' in path:
        return
    tree = ast.parse(Path(path).expanduser().read_bytes())
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    keys = _runner_keys()
    known = keys | {name.id for name in names if isinstance(name.ctx, ast.Load)}
    for name in names:
        near = difflib.get_close_matches(name.id, keys, n=1, cutoff=0.85)
        if name.id not in known and near:
            raise SystemExit(
                f'{path}, line {name.lineno}: no part of a training reads {name.id!r}; is it '
                f'{near[0]}?'
            )


def _require_no_near_key(config: Config, option: str, path: str) -> None:
    """End the program if an override would add a key beside one of nearly its name.

    MMEngine adds it, and most parts that would read the right key go on without it.
    """
    node: Any = config._cfg_dict
    known = {*node, *_runner_keys()}
    for i, key in enumerate(keys := option.split('.')):
        if not isinstance(node, dict):
            return
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        if key not in known and near:
            right = '.'.join([*keys[:i], near[0], *keys[i + 1 :]])
            raise SystemExit(f'--cfg-options {option}: {path} has no such key; is it {right}?')
        node = node.get(key)
        known = set(node) if isinstance(node, dict) else set()


@contextmanager
def mistakes_in_one_sentence(config: Config) -> Iterator[None]:
    """End the program with one sentence where an error comes from a mistake in the config.

    The sentence takes the place of what MMEngine's builders raise about types, arguments and
    values, and of what the parts of a model raise that do not fit each other. All other errors
    pass.

    Args:
        config (Config): The config that is built from.

    Raises:
        SystemExit: A type or an argument does not exist, a value is refused, or a part of the
            model gets channels or maps that it was not built for. The message has the name, and
            near ones.
    """
    try:
        yield
    except ConversionError as error:
        raise SystemExit(f'model.odconv: {error}') from error
    except ArgumentError as error:
        raise SystemExit(f'{_owner(error) or config.filename}: {error}') from error
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        message = _mistake(error, config) or _misfit(error)
        if message is None:
            raise
        raise SystemExit(f'{config.filename}: {message}') from error


def _owner(error: ArgumentError) -> str | None:
    """Whose argument is refused: the layers', or that of a hook or another part by its class."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        owner = frame.f_locals.get('self')
        if isinstance(owner, nn.Module):
            return 'the ODConv layers of the config'
        if type(owner).__module__.startswith('mmdet_odconv.'):
            return type(owner).__name__
    return None


def _mistake(error: Exception, config: Config) -> str | None:
    """What a builder says about a config; None if the error may have another cause."""
    text = str(error.args[0] if error.args else error)
    unknown = re.match(r'(\S+) is not in the (?:\S+::)?([\w ]+) registry', text)
    if unknown:
        near = _is_it(unknown[1], _registered(unknown[2]))
        return f'there is no {unknown[2]} {unknown[1]!r}{near}'
    if text == 'None is not a callable object':  # the optimizer, which no registry builds
        name = config.optim_wrapper.optimizer.type
        return f'there is no optimizer {name!r}{_is_it(name, _registered("optimizer"))}'
    if isinstance(error, TypeError):
        # Of PyTorch, which says neither the name nor the value of what is no number.
        for key, value in _entries(config._cfg_dict):
            if isinstance(value, str) and re.search(r'(^|\.)optimizer\.(?!type$)\w+$', key):
                return f'{key} must be a number, got {value!r}'
    argument = re.search(
        r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'", text
    )
    keys = {key.rpartition('.')[2] for key, _ in _entries(config._cfg_dict)}
    if argument and argument[2] in keys:
        near = _is_it(argument[2], sorted(keys - {argument[2]}))
        return f'{argument[1]} has no argument {argument[2]!r}{near}'
    frames = traceback.extract_tb(error.__traceback__)
    of_library = Path(mmengine.__path__[0]).parent in Path(frames[-1].filename).parents
    if of_library and any(frame.name in ('build_from_cfg', 'build_dataloader') for frame in frames):
        return f'{text[:1].lower()}{text[1:]}' if isinstance(error, AssertionError) else text
    return None


def _misfit(error: Exception) -> str | None:
    """What a part of a model says about its input; None if the error has another cause."""
    text = str(error.args[0] if error.args else '')
    channels = re.search(r'to have (\d+) channels, but got (\d+)', text) or re.search(
        r'expects (\d+) input channels, got (\d+)', text
    )
    frames = list(traceback.walk_tb(error.__traceback__))
    parts = [frame.f_locals.get('self') for frame, _ in frames]
    modules = [part for part in parts if isinstance(part, nn.Module) and '_modules' in vars(part)]
    if not modules:
        return None
    names = {id(module): name for name, module in modules[0].named_modules()}
    name = f'model.{names.get(id(modules[-1]), "")}'.replace('model.module.', 'model.').rstrip('.')
    if channels:
        return (
            f'{name} takes {channels[1]} channels, but its input has {channels[2]}; check the '
            f'in_channels of {".".join(name.split(".")[:2])}'
        )
    if isinstance(error, AssertionError) and not text:
        line = traceback.extract_tb(error.__traceback__)[-1].line
        return f'{type(modules[-1]).__name__} refuses what it is given: {line}'
    return None


def _registered(kind: str) -> list[str]:
    """The names in the registries of a kind, 'model' say, MMEngine's and those below it."""
    found, left = set(), [v for v in vars(registry).values() if isinstance(v, Registry)]
    for each in left:
        left += each.children.values()
        if each.name == kind:
            found |= set(each.module_dict)
    return sorted(found)


def _is_it(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=2)
    return f'; is it {" or ".join(near)}?' if near else ''


def _entries(node: Any, start: str = '') -> Iterator[tuple[str, Any]]:
    """All entries of a config with their dotted keys."""
    if isinstance(node, (list, tuple)):
        node = dict(enumerate(node))
    for key, value in node.items() if isinstance(node, dict) else ():
        yield f'{start}{key}', value
        yield from _entries(value, f'{start}{key}.')


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
    if config.model.get('type') == 'ODConvModel':
        config.model.report = 'summary'


def build_runner(config: Config) -> Runner:
    """The runner that the config asks for.

    Raises:
        SystemExit: The work folder cannot be written, the config has a mistake
            (:func:`mistakes_in_one_sentence`), the launcher did not start this process, or there
            are several processes on this machine without a GPU, and the config does not say that
            they use CPUs.
    """
    require_writable(config.work_dir, 'work folder', '--work-dir')
    starter, variable = _STARTED_BY.get(config.get('launcher', 'none'), ('', ''))
    if variable and variable not in os.environ:
        raise SystemExit(
            f'--launcher {config.launcher} is for processes that were started by {starter}, but '
            f'the environment has no {variable}'
        )
    with mistakes_in_one_sentence(config), _processes_on_cpus(config):
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
    _require_device(device)
    content = require_checkpoint(checkpoint)
    shorten_report(config)
    with mistakes_in_one_sentence(config):
        # With options, if empty, mmdet does not look for a backbone in an ODConvModel's config.
        model = init_detector(config, checkpoint, device=device, cfg_options={})
    if odconv:
        require_odconv_layers(model, config.filename)
    require_weights(model, content)
    return model


def _require_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition('\n')[0]
        raise SystemExit(f'--device {device} cannot be used: {reason}') from error


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


def positive(text: str) -> int:
    """A whole number of at least one, as the type of an argument."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f'must be a whole number of at least 1, got {text}')
    return int(text)


def require_file(path: str, what: str) -> None:
    """End the program unless ``path`` is a file, or lies elsewhere than on this disk.

    A checkpoint of DeepSpeed is a folder, and the message says how to make a file from it.

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
        SystemExit: The file exists and ``force`` is off, it is a folder, or its own folder does
            not exist or cannot be written to.
    """
    if Path(path).is_dir():
        raise SystemExit(f'{path} is a folder, where a file is to be written')
    if Path(path).exists() and not force:
        raise SystemExit(f'{path} exists; --force overwrites it')
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise SystemExit(f'the folder of {path} does not exist')
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SystemExit(f'{path} cannot be written ({error.strerror})') from error


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
        SystemExit: There is no such file, no image in the folder, or a file that is not an image.
            A single file is decoded; of the files in a folder the first bytes are read.
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
