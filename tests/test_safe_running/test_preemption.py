import multiprocessing
import os
import signal
import subprocess
import time
from unittest import mock

import pytest
import torch
from mmengine.hooks import Hook

from mmdet_odconv.safe_running import PreemptionHook, latest_checkpoint
from tests.tiny_training import (
    BATCHES,
    Images,
    InChild,
    assert_equal_bit_for_bit,
    runner,
    weights_of,
)


class Signal(Hook):
    """Sends SIGTERM at a moment of the training, as a scheduler would."""

    def __init__(self, moment, iteration, group=False):
        self.moment, self.iteration, self.group = moment, iteration, group
        setattr(self, moment, self._send)

    def _send(self, runner, *args, **kwargs):
        if runner.iter == self.iteration:
            self.iteration = None
            if self.group:
                # Workers end in another way, without an error, if their own parent sends it.
                subprocess.run(['kill', '-TERM', '--', f'-{os.getpgrp()}'])
                time.sleep(0.5)  # in which the loss of a worker would be noticed
            else:
                os.kill(os.getpid(), signal.SIGTERM)


def train(work_dir, signal_at=None, group=False, **options):
    if group:
        os.setpgid(0, 0)
    hooks = [dict(type='PreemptionHook')]
    if signal_at is not None:
        hooks.append(Signal(*signal_at, group=group))
    runner(work_dir, hooks=hooks, **options).train()


def train_slowly(*args, **kwargs):
    os.register_at_fork(after_in_child=lambda: time.sleep(0.5))  # workers that start slowly
    train(*args, **kwargs)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('undisturbed')
    assert InChild(train, folder).wait() == 0
    return weights_of(folder / 'epoch_4.pth')


@pytest.mark.parametrize(
    ('moment', 'iteration', 'done', 'name'),
    [
        ('before_train_iter', 0, 1, 'preempted.pth'),
        ('before_train_iter', 7, 8, 'preempted.pth'),
        ('before_train_iter', 2 * BATCHES - 1, 2 * BATCHES, 'preempted.pth'),
        ('before_val_iter', 2 * BATCHES, 2 * BATCHES, 'epoch_2.pth'),
        ('after_val_epoch', 3 * BATCHES, 3 * BATCHES, 'epoch_3.pth'),
    ],
)
def test_sigterm_saves_and_the_resumed_run_has_the_same_bits(
    undisturbed, tmp_path, moment, iteration, done, name
):
    assert InChild(train, tmp_path, signal_at=(moment, iteration)).wait() == 99
    latest = latest_checkpoint(str(tmp_path))
    assert latest.path == str(tmp_path / name)
    assert latest.meta['iter'] == done
    assert InChild(train, tmp_path, resume=True).wait() == 0
    assert_equal_bit_for_bit(weights_of(tmp_path / 'epoch_4.pth'), undisturbed)
    assert not (tmp_path / 'preempted.pth').exists()


def test_gradients_that_wait_for_a_step_are_saved(tmp_path):
    options = dict(epochs=2, accumulative_counts=4)
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    assert InChild(train, whole, **options).wait() == 0
    assert InChild(train, parts, **options, signal_at=('before_train_iter', 5)).wait() == 99
    assert InChild(train, parts, **options, resume=True).wait() == 0
    states = [weights_of(folder / 'epoch_2.pth') for folder in (parts, whole)]
    assert_equal_bit_for_bit(*states)


def test_two_signals_in_one_epoch(undisturbed, tmp_path):
    for iteration in (6, 8):
        child = InChild(train, tmp_path, resume=True, signal_at=('before_train_iter', iteration))
        assert child.wait() == 99
        assert torch.load(tmp_path / 'preempted.pth')['meta']['iter'] == iteration + 1
    assert InChild(train, tmp_path, resume=True).wait() == 0
    assert_equal_bit_for_bit(weights_of(tmp_path / 'epoch_4.pth'), undisturbed)


def test_a_run_by_iterations(tmp_path):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    options = dict(max_iters=10, checkpoint=dict(interval=4))
    assert InChild(train, whole, **options).wait() == 0
    child = InChild(train, parts, signal_at=('before_train_iter', 5), **options)
    assert child.wait() == 99
    assert InChild(train, parts, resume=True, **options).wait() == 0
    assert_equal_bit_for_bit(weights_of(parts / 'iter_10.pth'), weights_of(whole / 'iter_10.pth'))


@pytest.mark.parametrize(
    ('moment', 'iteration', 'done'),
    [
        ('before_train_iter', 6, 7),
        ('before_train_iter', 0, 1),
        ('before_val_iter', BATCHES, BATCHES),
    ],
)
def test_a_signal_to_the_workers_too(tmp_path, moment, iteration, done):
    """Slurm signals every process of a job; workers that died would end the iteration."""
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    options = dict(num_workers=2, epochs=2)
    assert InChild(train, whole, **options).wait() == 0
    child = InChild(train_slowly, parts, signal_at=(moment, iteration), group=True, **options)
    assert child.wait() == 99
    assert latest_checkpoint(str(parts)).meta['iter'] == done
    assert InChild(train, parts, resume=True, **options).wait() == 0
    assert_equal_bit_for_bit(weights_of(parts / 'epoch_2.pth'), weights_of(whole / 'epoch_2.pth'))


def test_workers_that_persist_end_with_the_training(tmp_path):
    child = InChild(train, tmp_path, epochs=1, num_workers=2, persistent_workers=True)
    assert child.wait() == 0


def failing(work_dir):
    Images.__getitem__ = lambda self, index: 1 / 0  # in this process and its workers
    train(work_dir, num_workers=2)


def test_workers_end_with_a_training_that_an_image_has_ended(tmp_path):
    """Here in a process that multiprocessing started, as sweeps of settings start theirs."""
    assert InChild(failing, tmp_path).wait() == 1


def no_order(self):
    raise ZeroDivisionError


def failing_at_once(work_dir):
    with mock.patch('mmengine.dataset.DefaultSampler.__iter__', no_order):
        train_slowly(work_dir, num_workers=2)


def test_workers_that_still_start_end_with_a_training_that_has_failed(tmp_path):
    assert InChild(failing_at_once, tmp_path).wait() == 1


class StartsHelper(Hook):
    """Starts a process that Python ends by SIGTERM when the training's ends."""

    def before_train_epoch(self, runner):
        sleep = dict(target=time.sleep, args=(10_000,), daemon=True)
        multiprocessing.get_context('fork').Process(**sleep).start()


def train_with_helper(work_dir):
    runner(work_dir, epochs=1, hooks=[dict(type='PreemptionHook'), StartsHelper()]).train()


def test_other_processes_end_by_sigterm(tmp_path):
    assert InChild(train_with_helper, tmp_path).wait() == 0


def test_an_epoch_of_another_length_starts_anew(tmp_path):
    assert InChild(train, tmp_path, signal_at=('before_train_iter', 6)).wait() == 99
    tiny = runner(tmp_path, epochs=2, resume=True, batch_size=5)
    tiny.train()
    assert (
        'an epoch has 2 now: the epoch starts anew'
        in next(tmp_path.glob(f'{tiny.timestamp}/*.log')).read_text()
    )
    assert (tmp_path / 'epoch_2.pth').is_file()


def test_needs_the_checkpoint_hook_of_this_package(tmp_path):
    hooks = [dict(type='PreemptionHook')]
    with pytest.raises(TypeError, match=r"default_hooks\.checkpoint\.type='SafeCheckpointHook'"):
        runner(tmp_path, hooks=hooks, checkpoint=dict(type='CheckpointHook')).train()


@pytest.mark.parametrize('exit_code', [0, 256, -15, 1.5])
def test_exit_codes_out_of_range_are_refused(exit_code):
    with pytest.raises(ValueError, match=f'exit_code .*got {exit_code}'):
        PreemptionHook(exit_code=exit_code)
