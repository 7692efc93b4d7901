"""The weights that a tool starts from, and what it says where they are missing or do not fit."""

import math
import platform
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from mmdet.apis import init_detector
from mmengine.config import Config
from mmengine.dist import all_gather_object
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import Tensor, nn

from ..analysis import odconv_layers
from ..backbones import EfficientNetLite
from ..deployment import collapse_static_layers
from ..layers import DynamicConvNd
from ..safe_running import (
    Checkpoint,
    CheckpointFileError,
    config_errors_as_exit,
    not_finite,
    read_checkpoint,
    require_datasets,
    unwrapped,
)
from ..safe_running.dataset_checks import not_found
from ..safe_running.reading import web_address
from .configs import shorten_report
from .files import require_file


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
    with config_errors_as_exit(config):
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


def require_odconv_layers(model: nn.Module, config: str) -> None:
    """End the program if the model of a config has no ODConv layer to analyse."""
    try:
        odconv_layers(model)
    except ValueError as error:
        raise SystemExit(f'{config}: {error}') from error


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
        SystemExit: Entries are missing, have other shapes, values that are not finite or are those
            of another norm. The message names the first of them, and both numbers of kernels or
            of classes.
    """
    state_dict = checkpoint.content.get('state_dict', checkpoint.content)
    entries = {name.removeprefix('module.'): value for name, value in state_dict.items()}
    complaints = _other_shapes(model, entries)
    norms = {name for name, module in model.named_modules() if hasattr(module, 'eps')}
    known = model.state_dict()
    for name in entries:
        norm = name.removesuffix('.running_mean')
        if norm != name and norm in norms and name not in known:
            complaints.append(f'{norm} is a BatchNorm in the file, but not in the config')
            break
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


def _other_shapes(model: nn.Module, entries: dict[str, Any]) -> list[str]:
    """What has one shape in the file and another in the model, banks of another K apart."""
    banks = {
        f'{name}.weight' if name else 'weight': module.kernel_shape
        for name, module in model.named_modules()
        if isinstance(module, DynamicConvNd)
    }
    kernel_nums: Counter[tuple[int, int]] = Counter()
    others = []
    for name, ours in model.state_dict().items():
        theirs = entries.get(name)
        if not isinstance(theirs, Tensor) or theirs.shape == ours.shape:
            continue
        if theirs.shape == banks.get(name):
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
                if isinstance(module, EfficientNetLite):
                    without += f' {key}.frozen_stages=0; {module.how_to_get_weights()}'
                elif getattr(module, 'frozen_stages', -1) >= 0:
                    without += f' {key}.frozen_stages=-1 {key}.norm_eval=False'
                _require_loadable(init_cfg['checkpoint'], f'{key}.init_cfg.checkpoint', without)


def _require_loadable(path: str, option: str, without: str) -> None:
    if '://' not in path and not Path(path).exists():
        raise SystemExit(f'{not_found(path, option)}; to start without it set {without}')
    try:
        read_checkpoint(path)
    except CheckpointFileError as error:  # no network and no torchvision, too
        address = web_address(path)
        fetch = f'fetch {address} and set' if address else 'set'
        raise SystemExit(
            f'{option}: {error}; {fetch} --cfg-options {option}=FILE, '
            f'or start without these weights by --cfg-options {without}'
        ) from error
