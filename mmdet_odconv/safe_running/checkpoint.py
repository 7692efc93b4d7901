"""Checkpoints that survive a kill or a full disk, and a training that goes on exactly from them."""

import os
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from mmengine.dist import (
    all_gather_object,
    all_reduce_dict,
    get_rank,
    is_main_process,
)
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import Tensor

from .._checks import check_integer
from ..compat import batches_to_skip, skip_batches
from .reading import unwrapped

_BACKEND = 'durable_local'
# The key of a checkpoint under which it has what MMEngine itself does not save.
_POSITION = 'position'


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved; those that were there are as they were."""


def write_durably(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file that has either its old content or the whole new one, whatever happens.

    The content goes to a hidden file beside it, to the disk, and only then under its name.

    Raises:
        CheckpointError: The disk is full, or the folder cannot be written to.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open('wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise CheckpointError(
            f'{path} ({len(content) / 2**20:.1f} MiB) cannot be saved: {error.strerror}; '
            'all earlier checkpoints are as they were'
        ) from error
    if os.name == 'posix':  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name, too, is on the disk only then
        finally:
            os.close(folder)


@register_backend(_BACKEND)
class DurableLocalBackend(LocalBackend):
    """MMEngine's local files, written by :func:`write_durably`."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        write_durably(filepath, obj)


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """MMEngine's ``CheckpointHook``, made safe against kills and full disks.

    It has the same arguments, names and files, with these differences:

    - A checkpoint, the best one and ``last_checkpoint`` appear under their names only when they
      are complete and on the disk. What they replace is removed after that.
    - A checkpoint also has the states of the random generators of all processes, the place in
      the epoch, and with ``accumulative_counts`` the gradients that wait for a step (of several
      processes, their mean). A resumed run goes on as if it had never been interrupted. For this,
      validation leaves the generators as it found them.
    - :meth:`save_now` saves ``preempted.pth`` in the middle of an epoch. The next regular
      checkpoint removes it.

    MMEngine can resume from these checkpoints, and this hook from MMEngine's, but then without the
    second point. On object stores (``backend_args``) files are written as MMEngine writes them.
    The generators of data loader workers are not saved: with ``persistent_workers=True`` a resumed
    run draws other augmentations.

    Args:
        *args, **kwargs: As in ``mmengine.hooks.CheckpointHook``.

    Raises:
        ValueError: ``interval`` or ``max_keep_ckpts`` is no integer.
    """

    PREEMPTED = 'preempted.pth'

    file_backend: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ('interval', 'max_keep_ckpts'):
            check_integer(name, getattr(self, name), least=-1)
        self._loaded: dict[str, Any] | None = None
        self._position: dict[str, Any] | None = None
        self._whole_loader: Any = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint.get(_POSITION)
        if runner._resume and (others := _other_settings(runner, checkpoint)):
            runner.logger.warning(
                f'The resumed training keeps the settings of its optimizer: {", ".join(others)}. '
                'To train with those of the config, start anew from these weights by load_from.'
            )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if self._position is not None:
            checkpoint[_POSITION] = self._position

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        if isinstance(self.file_backend, LocalBackend) and self.file_client_args is None:
            self.backend_args = dict(backend=_BACKEND)
        self._saved_iter = self._first_iter = runner.iter
        loaded, self._loaded = self._loaded, None
        loop = runner.train_loop
        if loaded is None or runner.iter == 0:  # its weights are the start of another run
            return
        _set_gradients(runner, loaded.get('gradients', {}))
        if isinstance(loop, IterBasedTrainLoop):  # which itself skips what it has done
            loop.dataloader_iterator = _ResumedBatches(
                loop.dataloader_iterator, batches_to_skip(loop), loaded['generators']
            )
        elif loaded.get('batches') and loaded['batches_of_epoch'] != len(loop.dataloader):
            runner.logger.warning(
                f'the checkpoint was saved after {loaded["batches"]} of '
                f'{loaded["batches_of_epoch"]} batches of an epoch, but an epoch has '
                f'{len(loop.dataloader)} now: the epoch starts anew'
            )
        elif 'batches' in loaded:  # not by a loop without epochs
            self._loaded = loaded

    def before_train_epoch(self, runner: Runner) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loop = runner.train_loop
            self._whole_loader = loop.dataloader
            loop.dataloader = _Remaining(loop.dataloader, loaded['batches'], loaded['generators'])
            self._first_iter = runner.iter - loaded['batches']

    def after_train_epoch(self, runner: Runner) -> None:
        if self._whole_loader is not None:
            runner.train_loop.dataloader, self._whole_loader = self._whole_loader, None
        self._first_iter = runner.iter
        super().after_train_epoch(runner)

    def before_val_epoch(self, runner: Runner) -> None:
        self._before_val = _generators()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, Any]) -> None:
        _set_generators(self._before_val)
        # MMEngine removes the last best checkpoint before it saves the next: here it goes after.
        replaced: list[str] = []
        with mock.patch.object(self.file_backend, 'remove', replaced.append):
            super().after_val_epoch(runner, metrics)
        best = {getattr(self, 'best_ckpt_path', None)}
        best.update(getattr(self, 'best_ckpt_path_dict', {}).values())
        for path in replaced:
            if path not in best:
                self._remove(path)

    def is_saved(self, iterations: int) -> bool:
        """Whether the last checkpoint was saved after just this number of iterations."""
        return self._saved_iter == iterations

    def save_now(self, runner: Runner, iterations: int) -> str:
        """Save where the training is, between two regular checkpoints.

        Args:
            runner (Runner): The runner; all processes must call.
            iterations (int): The number of iterations that are done.

        Returns:
            str: The path of the checkpoint.
        """
        return self._save(runner, self.PREEMPTED, dict(epoch=runner.epoch, iter=iterations))

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        outdated: list[int] = []
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            ids = [*self.keep_ckpt_ids, step]
            outdated = ids[: -self.max_keep_ckpts]
            # The ones about to be removed, too: if a kill comes first, the resumed run does it.
            runner.message_hub.update_info('keep_ckpt_ids', ids)
            self.keep_ckpt_ids.append(step)
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        self._save(runner, name, meta)
        for old in (*map(self.filename_tmpl.format, outdated), self.PREEMPTED):
            self._remove(self.file_backend.join_path(self.out_dir, old))

    def _save(self, runner: Runner, name: str, meta: dict[str, Any]) -> str:
        loop = runner.train_loop
        self._position = dict(
            generators=all_gather_object(_generators()), gradients=_pending_gradients(runner)
        )
        if isinstance(loop, EpochBasedTrainLoop):
            whole = loop.dataloader if self._whole_loader is None else self._whole_loader
            self._position |= dict(
                batches=meta['iter'] - self._first_iter, batches_of_epoch=len(whole)
            )
        try:
            runner.save_checkpoint(
                self.out_dir,
                name,
                self.file_client_args,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                **self.args,
            )
        finally:
            self._position = None
        path = self.file_backend.join_path(self.out_dir, name)
        if is_main_process():
            write_durably(Path(runner.work_dir) / 'last_checkpoint', os.fsencode(path))
        self._saved_iter = meta['iter']
        return path

    def _remove(self, path: str) -> None:
        if is_main_process() and self.file_backend.isfile(path):
            self.file_backend.remove(path)


class _Remaining:
    """A data loader without its first batches: the rest of an epoch that was interrupted.

    The batches are loaded all the same, so that the generators of the data loader's workers are
    where they were.
    """

    def __init__(self, loader: Any, skip: int, generators: list[dict[str, Any]]) -> None:
        self.loader, self.skip, self.generators = loader, skip, generators

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader) - self.skip

    def __iter__(self) -> Iterator[Any]:
        if not self.skip:
            _set_generators_of_process(self.generators)
            return iter(self.loader)
        batches = iter(self.loader)
        for _ in range(self.skip):
            next(batches)
        _set_generators_of_process(self.generators)
        return batches


class _ResumedBatches:
    """The batches of a loop by iterations, which itself takes those that are done once more.

    Before the first of the others, the generators are set.
    """

    def __init__(self, batches: Iterator[Any], done: int, generators: list[dict[str, Any]]) -> None:
        self.batches, self.done, self.generators = batches, done, generators

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.done == 0:
            _set_generators_of_process(self.generators)
        self.done -= 1
        return next(self.batches)

    def skip_iter(self, number: int) -> None:
        """What the onedl line's MMEngine calls for the batches that are done."""
        skip_batches(self.batches, number)
        self.done -= number


def _other_settings(runner: Runner, checkpoint: dict[str, Any]) -> list[str]:
    """What a checkpoint's optimizer was set to and the config's is not, such as 'lr 0.1, not 1'."""
    ours, theirs = runner.optim_wrapper, checkpoint.get('optimizer') or {}
    if not isinstance(ours, OptimWrapper) or 'param_groups' not in theirs:
        return []
    others: dict[str, str] = {}
    for ours_of, theirs_of in zip(ours.param_groups, theirs['param_groups'], strict=False):
        for name, value in ours_of.items():
            # What a scheduler moves has its start beside it.
            if name == 'params' or f'initial_{name}' in ours_of or name not in theirs_of:
                continue
            if value != theirs_of[name]:
                setting = f'{name.removeprefix("initial_")} {theirs_of[name]}, not {value}'
                others.setdefault(name, setting)
    return list(others.values())


def _pending_gradients(runner: Runner) -> dict[str, Tensor]:
    """The gradients of a model, by name, that wait for a step of the optimizer."""
    wrapper: Any = runner.optim_wrapper
    # A dict of wrappers, as generative models have, does not tell.
    if not isinstance(wrapper, OptimWrapper) or wrapper.should_update():
        return {}
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in unwrapped(runner.model).named_parameters()
        if parameter.requires_grad
    }
    all_reduce_dict(gradients, 'mean')
    return gradients


def _set_gradients(runner: Runner, gradients: dict[str, Tensor]) -> None:
    for name, parameter in unwrapped(runner.model).named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter)
    if gradients:
        runner.logger.info('The gradients that waited for a step are those of the checkpoint.')


def _generators() -> dict[str, Any]:
    """The states of this process's random generators, in types that ``torch.load`` finds safe."""
    name, keys, *rest = np.random.get_state()
    states = dict(
        python=random.getstate(),
        numpy=(name, np.asarray(keys).tolist(), *rest),
        torch=torch.get_rng_state(),
    )
    if torch.cuda.is_available():
        states['cuda'] = torch.cuda.get_rng_state()
    return states


def _set_generators(states: dict[str, Any]) -> None:
    random.setstate(states['python'])
    np.random.set_state(states['numpy'])
    torch.set_rng_state(states['torch'].cpu())
    if 'cuda' in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states['cuda'].cpu())


def _set_generators_of_process(states: list[dict[str, Any]]) -> None:
    if get_rank() < len(states):  # else there were fewer processes
        _set_generators(states[get_rank()])
