"""From the command line to a config, and from the config to MMEngine's runner."""

import argparse
import ast
import difflib
import inspect
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import MODEL_WRAPPERS, RUNNERS
from mmengine.runner import Runner
from torch.nn.parallel import DistributedDataParallel

from ..conversion.builder import build_odconv_model
from ..safe_running.config_errors import config_errors_as_exit, entries
from .files import require_file, require_writable

# What starts the processes of each launcher, and a variable that it sets.
_STARTED_BY = dict(
    pytorch=('torchrun, as in tools/dist_train.sh', 'RANK'),
    slurm=('srun, as in tools/slurm_train.sh', 'SLURM_PROCID'),
    mpi=('mpirun', 'OMPI_COMM_WORLD_LOCAL_RANK'),
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
    """End the program if an override would add a key beside or above one of nearly its name.

    MMEngine adds it, and most parts that would read the right key go on without it.
    """
    node: Any = config._cfg_dict
    known = {*node, *_runner_keys()}
    first, _, rest = option.partition('.')
    below = [key for key, _ in entries(node) if key.endswith(f'.{first}')]
    if first not in known and not difflib.get_close_matches(first, known, n=1, cutoff=0.85):
        if first == 'odconv' and (node.get('model') or {}).get('type') == 'ODConvModel':
            below.insert(0, 'model.odconv')
        if below or rest:
            right = f'; is it {".".join(filter(None, [below[0], rest]))}?' if below else ''
            raise SystemExit(f'--cfg-options {option}: {path} has no {first}{right}')
    for i, key in enumerate(keys := option.split('.')):
        if not isinstance(node, dict):
            return
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        if key not in known and near:
            right = '.'.join([*keys[:i], near[0], *keys[i + 1 :]])
            raise SystemExit(f'--cfg-options {option}: {path} has no such key; is it {right}?')
        node = node.get(key)
        known = set(node) if isinstance(node, dict) else set()


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
            (:func:`config_errors_as_exit`), the launcher did not start this process, or there
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
