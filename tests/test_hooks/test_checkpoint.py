import errno
import os
import random
import resource
import signal

import pytest
import torch
from mmengine.runner import find_latest_checkpoint

from mmdet_odconv.checkpoint import CheckpointFileError, latest_checkpoint
from mmdet_odconv.hooks import CheckpointError
from mmdet_odconv.hooks import checkpoint as module
from tests.tiny_training import (
    BATCHES,
    InChild,
    assert_equal_bit_for_bit,
    runner,
    weights_of,
)


def train(work_dir, **options):
    runner(work_dir, **options).train()


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """The folder of a run of four epochs."""
    folder = tmp_path_factory.mktemp('undisturbed')
    assert InChild(train, folder).wait() == 0
    return folder


def names(folder):
    return sorted(path.name for path in folder.glob('*') if path.is_file())


def test_the_files_are_those_of_mmengine(undisturbed, tmp_path):
    assert InChild(train, tmp_path, checkpoint=dict(type='CheckpointHook')).wait() == 0
    assert names(undisturbed) == names(tmp_path)
    assert names(undisturbed) == [
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


def test_a_run_by_iterations_that_is_resumed_ends_with_the_same_bits(tmp_path):
    options = dict(max_iters=12, checkpoint=dict(interval=4))
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    assert InChild(train, whole, **options).wait() == 0
    assert InChild(train, parts, **(options | dict(max_iters=8))).wait() == 0
    assert InChild(train, parts, resume=True, **options).wait() == 0
    assert_equal_bit_for_bit(weights_of(parts / 'iter_12.pth'), weights_of(whole / 'iter_12.pth'))


@pytest.mark.parametrize('from_mmengine', [True, False])
def test_checkpoints_go_to_mmengine_and_back(tmp_path, from_mmengine):
    hooks = [{}, dict(type='CheckpointHook')]
    first, second = reversed(hooks) if from_mmengine else hooks
    assert InChild(train, tmp_path, epochs=2, checkpoint=first).wait() == 0
    assert InChild(train, tmp_path, resume=True, checkpoint=second).wait() == 0
    assert torch.load(tmp_path / 'epoch_4.pth')['meta']['iter'] == 4 * BATCHES


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
        reached = torch.load(latest)['meta']['iter'] if latest else 0
        assert reached >= iterations
        iterations = reached
    assert InChild(train, tmp_path, resume=True).wait() == 0
    assert_equal_bit_for_bit(
        weights_of(tmp_path / 'epoch_4.pth'), weights_of(undisturbed / 'epoch_4.pth')
    )
    assert [name for name in names(tmp_path) if name.startswith('epoch')] == [
        'epoch_3.pth',
        'epoch_4.pth',
    ]


def test_kills_at_random_moments_leave_the_same_bits(undisturbed, tmp_path):
    chance = random.Random(1)
    kills = 0
    while kills < 12:
        child = InChild(train, tmp_path, resume=True, pause=0.01)
        exit_code = child.kill_after(chance.uniform(0.1, 0.9))
        if exit_code == 0:
            break
        assert exit_code == -signal.SIGKILL
        kills += 1
    assert InChild(train, tmp_path, resume=True).wait() == 0
    assert_equal_bit_for_bit(
        weights_of(tmp_path / 'epoch_4.pth'), weights_of(undisturbed / 'epoch_4.pth')
    )


@pytest.fixture
def small_files():
    """No file may grow beyond 20 kB, which is less than a checkpoint has, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_all_that_was_saved(tmp_path, small_files):
    runner(tmp_path, epochs=2).train()
    before = {path: path.read_bytes() for path in tmp_path.glob('*') if path.is_file()}
    tiny = runner(tmp_path, epochs=3, resume=True)
    small_files()
    with pytest.raises(CheckpointError, match=r'epoch_3\.pth \(.* MiB\) cannot be saved: File too'):
        tiny.train()
    assert {path: path.read_bytes() for path in tmp_path.glob('*') if path.is_file()} == before


def test_a_full_disk_at_the_first_save_leaves_no_file(tmp_path, small_files):
    tiny = runner(tmp_path, epochs=1)
    small_files()
    with pytest.raises(CheckpointError, match='earlier checkpoints are as they were'):
        tiny.train()
    assert names(tmp_path) == []


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
    assert 'best_acc_epoch_1.pth' in names(tmp_path)


class TestLatestCheckpoint:
    @pytest.fixture
    def folder(self, tmp_path):
        for epoch in (1, 2):
            path = tmp_path / f'epoch_{epoch}.pth'
            torch.save(dict(optimizer={}, epoch=epoch), path)
            os.utime(path, (epoch, epoch))
        (tmp_path / 'last_checkpoint').write_text(str(path))
        return tmp_path

    def test_is_the_one_that_is_named(self, folder):
        (folder / 'last_checkpoint').write_text(str(folder / 'epoch_1.pth'))
        assert latest_checkpoint(str(folder)) == str(folder / 'epoch_1.pth')

    @pytest.mark.parametrize('size', [0, 10, 900])
    def test_is_never_a_truncated_one(self, folder, size):
        os.truncate(folder / 'epoch_2.pth', size)
        assert latest_checkpoint(str(folder)) == str(folder / 'epoch_1.pth')

    @pytest.mark.parametrize('name', ['', 'elsewhere/epoch_2.pth', 'epoch_7.pth'])
    def test_is_found_where_its_name_is_lost(self, folder, name):
        (folder / 'last_checkpoint').write_text(name)
        assert latest_checkpoint(str(folder)) == str(folder / 'epoch_2.pth')
        (folder / 'last_checkpoint').unlink()
        assert latest_checkpoint(str(folder)) == str(folder / 'epoch_2.pth')

    def test_is_none_in_a_new_folder(self, tmp_path):
        assert latest_checkpoint(str(tmp_path)) is None

    def test_without_a_readable_one_names_file_and_cause(self, folder):
        for path in folder.glob('*.pth'):
            path.write_bytes(b'no checkpoint')
        with pytest.raises(CheckpointFileError, match=r'epoch_2\.pth cannot be read'):
            latest_checkpoint(str(folder))
