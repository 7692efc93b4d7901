"""A runner hook that saves and ends the training when a scheduler takes the machine back."""

import functools
import logging
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier, get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from .._checks import ArgumentError, check_integer
from .checkpoint import SafeCheckpointHook


@HOOKS.register_module()
class PreemptionHook(Hook):
    """On SIGTERM, finish the iteration, save a checkpoint and end with an exit status of its own.

    Schedulers send SIGTERM some seconds before they end a job for good. ``--resume`` then goes on
    with the next iteration, as if nothing had happened. In a distributed run all processes stop
    after the same iteration, whichever of them got the signal. A signal during validation takes
    effect after the validation, or at once if the checkpoint of that epoch is saved already.

    Args:
        exit_code (int): The exit status. 99, which no error of Python has, makes Grid Engine start
            a job again; LSF and Slurm can be told so (docs/reliability.md). Default: 99.

    Raises:
        ValueError: ``exit_code`` is not within 1 and 255.
        TypeError: At the start of the training, if the checkpoint hook is not a
            :class:`SafeCheckpointHook`.
    """

    priority = 'LOWEST'

    def __init__(self, exit_code: int = 99) -> None:
        if check_integer('exit_code', exit_code, least=1) > 255:
            raise ArgumentError(f'exit_code must be at most 255, got {exit_code}')
        self.exit_code = exit_code
        self._received = False

    def before_train(self, runner: Runner) -> None:
        found = [hook for hook in runner.hooks if isinstance(hook, SafeCheckpointHook)]
        if not found:
            raise TypeError(
                "PreemptionHook needs default_hooks.checkpoint.type='SafeCheckpointHook'"
            )
        self._checkpoints = found[0]
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        # Slurm, for one, signals all processes of a job, and without its workers an iteration
        # cannot be finished. When a process ends, also by an error, Python ends workers that are
        # still there by SIGTERM, after these finalizers. A process that multiprocessing itself has
        # started, as torch.multiprocessing.spawn does, calls no function of atexit.
        self._training = multiprocessing.RawValue('b', 1)
        self._end = multiprocessing.util.Finalize(None, self._end_of_training, exitpriority=0)
        for loop in (runner.train_loop, runner.val_loop):
            if loop is not None:
                loader = loop.dataloader
                loader.worker_init_fn = functools.partial(
                    _defer_sigterm, loader.worker_init_fn, self._training
                )

    def _end_of_training(self) -> None:
        self._training.value = 0
        _let_sigterm_in()

    # The workers of an epoch start between its beginning and its first iteration. A signal would
    # end a worker that has no handler of its own yet, so they start with the signal held back.
    def before_train_epoch(self, runner: Runner) -> None:
        _hold_sigterm_back()

    before_val_epoch = before_train_epoch

    def before_train_iter(self, *args: Any, **kwargs: Any) -> None:
        _let_sigterm_in()

    before_val_iter = before_train_iter

    def after_train(self, runner: Runner) -> None:
        self._end()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._previous)

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        if self._anywhere(runner):
            self._stop(runner, runner.iter + 1)

    def after_val_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        # The processes of a distributed run may have unequal numbers of validation images.
        if self._received and get_world_size() == 1 and self._checkpoints.is_saved(runner.iter):
            self._stop(runner, runner.iter)

    def after_val_epoch(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        if self._anywhere(runner):
            self._stop(runner, runner.iter)

    def _receive(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:
            # A process that was forked since, which Python ends so, and waits for.
            signal.signal(number, self._previous)
            os.kill(os.getpid(), number)
            return
        self._received = True
        print_log('SIGTERM: the training stops after this iteration', logger='current')

    def _anywhere(self, runner: Runner) -> bool:
        """Whether any process has got the signal."""
        if get_world_size() == 1:
            return self._received
        device = next(runner.model.parameters()).device
        received = torch.tensor(float(self._received), device=device)
        all_reduce(received, 'max')
        return bool(received.item())

    def _stop(self, runner: Runner, iterations: int) -> None:
        if not self._checkpoints.is_saved(iterations):
            self._checkpoints.save_now(runner, iterations)
        barrier()  # a launcher that sees one process end may kill the one that still saves
        print_log(
            f'SIGTERM: stopped and saved after {iterations} iterations; --resume goes on from '
            f'there, and exit status {self.exit_code} asks the scheduler to start the job again',
            logger='current',
            level=logging.WARNING,
        )
        raise SystemExit(self.exit_code)


def _defer_sigterm(then: Callable[[int], None] | None, training: Any, worker_id: int) -> None:
    """Start a worker process that goes on after SIGTERM while ``training.value`` is not 0."""

    def end_after_training(*args: object) -> None:
        if not training.value:
            os._exit(0)  # as PyTorch's workers do; any other end is an error to the main process

    signal.signal(signal.SIGTERM, end_after_training)
    _let_sigterm_in()
    end_after_training()  # a signal that came before this, and was not held back, had no effect
    if then is not None:
        then(worker_id)


def _hold_sigterm_back() -> None:
    if hasattr(signal, 'pthread_sigmask'):  # Windows has none
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def _let_sigterm_in() -> None:
    if hasattr(signal, 'pthread_sigmask'):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
