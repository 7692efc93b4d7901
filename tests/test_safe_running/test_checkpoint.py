import errno
import functools
import os
import random
import resource
import signal
import threading

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import find_latest_checkpoint

from mmdet_odconv.safe_running import CheckpointError, latest_checkpoint
from mmdet_odconv.safe_running import checkpoint as module
from tests.tiny_training import (
    BATCHES,
    InChild,
    assert_equal_bit_for_bit,
    quick,
    runner,
    weights_of,
)


@pytest.fixture(autouse=True)
def _quick():
    with quick():
        yield


def train(work_dir, **options):
    runner(work_dir, **options).train()


class KillAt(Hook):
    """Kills the process before an iteration."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """The folder of a run of four epochs."""
    folder = tmp_path_factory.mktemp('undisturbed')
    assert InChild(train, folder).wait() == 0
    return folder


def files(folder):
    """The checkpoints in a folder and the name of the last, with what they hold."""
    paths = [path for path in folder.iterdir() if path.is_file() and path.suffix != '.py']
    return {path.name: path.read_bytes() for path in sorted(paths)}


def test_the_files_are_those_of_mmengine(undisturbed, tmp_path):
    assert InChild(train, tmp_path, checkpoint=dict(type='CheckpointHook')).wait() == 0
    assert list(files(undisturbed)) == list(files(tmp_path))
    assert list(files(undisturbed)) == [
        'best_acc_epoch_4.pth',
        'epoch_3.pth',
        'epoch_4.pth',
        'last_checkpoint',
    ]
    assert find_latest_checkpoint(str(undisturbed)) == str(undisturbed / 'epoch_4.pth')


@pytest.mark.parametrize('epochs', [1, 3])
def test_a_resumed_run_ends_with_the_same_bits(undisturbed, tmp_path, epochs):
    assert InChild(train, tmp_path, epochs=epochs).wait() == 0
    assert InChild(train, tmp_path, resume=True).wait() == 0
    assert_equal_bit_for_bit(
        weights_of(tmp_path / 'epoch_4.pth'), weights_of(undisturbed / 'epoch_4.pth')
    )


def test_gradients_that_wait_for_a_step_are_saved(tmp_path):
    """An epoch has five iterations, and each fourth one makes a step."""
    options = dict(epochs=3, accumulative_counts=4)
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    assert InChild(train, whole, **options).wait() == 0
    assert InChild(train, parts, **options, hooks=[KillAt(7)]).wait() == -signal.SIGKILL
    assert InChild(train, parts, **options, resume=True).wait() == 0
    states = [weights_of(folder / 'epoch_3.pth') for folder in (parts, whole)]
    assert_equal_bit_for_bit(*states)
    saved = torch.load(parts / 'epoch_3.pth')['position']
    assert not saved['gradients']  # the last iteration makes a step in any case


def test_a_run_by_iterations_that_is_resumed_ends_with_the_same_bits(tmp_path):
    options = dict(max_iters=12, checkpoint=dict(interval=4))
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    assert InChild(train, whole, **options).wait() == 0
    assert InChild(train, parts, **(options | dict(max_iters=8))).wait() == 0
    assert InChild(train, parts, resume=True, **options).wait() == 0
    assert_equal_bit_for_bit(weights_of(parts / 'iter_12.pth'), weights_of(whole / 'iter_12.pth'))


def test_a_run_that_saves_within_its_epochs_goes_on_from_there(tmp_path):
    """With epochs of an hour, a checkpoint at the end of each would be too few."""
    options = dict(epochs=3, checkpoint=dict(by_epoch=False, interval=3))
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    assert InChild(train, whole, **options).wait() == 0
    assert InChild(train, parts, **options, hooks=[KillAt(8)]).wait() == -signal.SIGKILL
    assert latest_checkpoint(str(parts)).path == str(parts / 'iter_6.pth')
    assert InChild(train, parts, **options, resume=True).wait() == 0
    states = [weights_of(folder / f'iter_{3 * BATCHES}.pth') for folder in (parts, whole)]
    assert_equal_bit_for_bit(*states)


@pytest.mark.parametrize('from_mmengine', [True, False])
def test_checkpoints_go_to_mmengine_and_back(tmp_path, from_mmengine):
    hooks = [{}, dict(type='CheckpointHook')]
    first, second = reversed(hooks) if from_mmengine else hooks
    assert InChild(train, tmp_path, epochs=2, checkpoint=first).wait() == 0
    assert InChild(train, tmp_path, resume=True, checkpoint=second).wait() == 0
    assert torch.load(tmp_path / 'epoch_4.pth')['meta']['iter'] == 4 * BATCHES


@pytest.mark.parametrize('lr', [0.01, 0.02])
def test_another_learning_rate_that_a_resumed_run_ignores_is_named(tmp_path, lr):
    assert InChild(train, tmp_path, epochs=1).wait() == 0
    assert InChild(train, tmp_path, epochs=2, resume=True, lr=lr).wait() == 0
    log = max(tmp_path.glob('*/*.log')).read_text()
    assert ('keeps the settings of its optimizer: lr 0.01, not 0.02.' in log) == (lr != 0.01)


def test_weights_of_another_run_are_a_start_only(undisturbed, tmp_path):
    tiny = runner(tmp_path, epochs=1)
    tiny._load_from = str(undisturbed / 'epoch_3.pth')
    tiny.train()
    assert torch.load(tmp_path / 'epoch_1.pth')['meta']['iter'] == BATCHES


def kill_at_write(work_dir, number, moment, **options):
    """Train, and die in the middle of the ``number``-th file that is saved."""
    written = 0

    def count(function, *args):
        nonlocal written
        written += 1
        if written == number:
            if moment == 'written half':
                os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
            if moment == 'renamed':
                function(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    name = 'fsync' if moment == 'written half' else 'replace'
    original = getattr(os, name)
    if name == 'fsync':  # which is called for the folder, too
        number = 2 * number - 1
    setattr(module.os, name, lambda *args: count(original, *args))
    train(work_dir, **options)


@pytest.mark.parametrize('moment', ['written half', 'before the rename', 'renamed'])
def test_a_kill_during_any_write_loses_nothing(undisturbed, tmp_path, moment):
    """Every file in turn: checkpoints, the best ones and the name of the last."""
    iterations = 0
    for number in range(1, 9):
        exit_code = InChild(kill_at_write, tmp_path, number, moment, resume=True).wait()
        assert exit_code in (0, -signal.SIGKILL)
        latest = latest_checkpoint(str(tmp_path))
        reached = latest.meta['iter'] if latest else 0
        assert reached >= iterations
        iterations = reached
    assert InChild(train, tmp_path, resume=True).wait() == 0
    assert_equal_bit_for_bit(
        weights_of(tmp_path / 'epoch_4.pth'), weights_of(undisturbed / 'epoch_4.pth')
    )
    assert [name for name in files(tmp_path) if name.startswith('epoch')] == [
        'epoch_3.pth',
        'epoch_4.pth',
    ]


class Kill(Hook):
    """Kills the process a moment after an iteration has begun."""

    def __init__(self, iterations, seconds):
        self.iterations, self.seconds = iterations, seconds

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.iterations -= 1
        if self.iterations == 0:
            die = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
            threading.Timer(self.seconds, die).start()


def test_kills_at_random_moments_leave_the_same_bits(tmp_path):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    assert InChild(train, whole, epochs=8).wait() == 0
    chance, kills, exit_code = random.Random(0), 0, None
    while exit_code != 0:
        # At most one epoch ends before the kill, and every second time none does.
        kill = Kill(chance.randint(1, 2 * BATCHES - 1), chance.uniform(0, 0.02))
        exit_code = InChild(train, parts, epochs=8, resume=True, hooks=[kill]).wait()
        assert exit_code in (0, -signal.SIGKILL)
        kills += exit_code != 0
    assert kills >= 10
    assert_equal_bit_for_bit(weights_of(parts / 'epoch_8.pth'), weights_of(whole / 'epoch_8.pth'))


@pytest.fixture
def small_files():
    """No file may grow beyond 20 kB, which is less than a checkpoint has, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_all_that_was_saved(tmp_path, small_files):
    runner(tmp_path, epochs=2).train()
    before = files(tmp_path)
    tiny = runner(tmp_path, epochs=3, resume=True)
    small_files()
    with pytest.raises(CheckpointError, match=r'epoch_3\.pth \(.* MiB\) cannot be saved: File too'):
        tiny.train()
    assert files(tmp_path) == before


@pytest.mark.parametrize('name', ['interval', 'max_keep_ckpts'])
def test_text_in_place_of_a_number_is_named(name):
    with pytest.raises(ValueError, match=f"{name} must be an integer, got 'often'"):
        module.SafeCheckpointHook(**{name: 'often'})


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(CheckpointError, match=r'file/a\.pth \(0\.0 MiB\) cannot be saved: File e'):
        module.write_durably(tmp_path / 'file/a.pth', b'content')


def test_a_full_disk_at_the_first_save_leaves_no_file(tmp_path, small_files):
    tiny = runner(tmp_path, epochs=1)
    small_files()
    with pytest.raises(CheckpointError, match='earlier checkpoints are as they were'):
        tiny.train()
    assert not files(tmp_path)


def test_the_best_checkpoint_stays_until_the_next_is_there(tmp_path, monkeypatch):
    runner(tmp_path, epochs=1).train()
    tiny = runner(tmp_path, epochs=2, resume=True)
    put = module.write_durably

    def full_at_the_best(path, content):
        if 'best' in str(path):
            raise CheckpointError(os.strerror(errno.ENOSPC))
        put(path, content)

    monkeypatch.setattr(module, 'write_durably', full_at_the_best)
    with pytest.raises(CheckpointError, match='No space'):
        tiny.train()
    assert 'best_acc_epoch_1.pth' in files(tmp_path)
