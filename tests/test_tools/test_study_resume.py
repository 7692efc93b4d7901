"""A run of the study that is killed goes on, and its log is whole."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

OPTIONS = {
    'model.backbone.base_channels': 4,
    'model.neck.in_channels': [4, 8, 16, 32],
    'train_cfg.max_epochs': 3,
    'train_dataloader.batch_size': 4,
    'default_hooks.logger.interval': 1,
}


@pytest.fixture
def last_checkpoint(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools/study'))
    from run import last_checkpoint

    return last_checkpoint


def test_a_checkpoint_counts_once_it_has_been_evaluated(tmp_path, last_checkpoint):
    assert last_checkpoint(tmp_path) is None
    for epoch in (9, 10):
        (tmp_path / f'epoch_{epoch}.pth').touch()
    log = tmp_path / '20260101_000000/vis_data/scalars.json'
    log.parent.mkdir(parents=True)
    metrics = {
        f'coco/bbox_{n}': 0.1 for n in ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
    }
    log.write_text(json.dumps({**metrics, 'step': 9}) + '\n')
    assert last_checkpoint(tmp_path) == tmp_path / 'epoch_9.pth'
    assert last_checkpoint(tmp_path, evaluated=False) == tmp_path / 'epoch_10.pth'


@pytest.mark.slow
def test_a_run_killed_between_checkpoint_and_evaluation_has_a_whole_log(tmp_path):
    tool = [sys.executable, ROOT / 'tools/make_shapes_dataset.py', tmp_path / 'data', '--hard']
    subprocess.run([*tool, '--train', '8', '--val', '4', '--size', '64', '64'], check=True)
    command = [sys.executable, ROOT / 'tools/study/run.py', 'plain', '--seeds', '0']
    command += ['--work-dirs', tmp_path / 'work', '--logs', tmp_path / 'logs']
    command += ['--options', json.dumps(OPTIONS)]
    env = {**os.environ, 'SHAPES_HARD_ROOT': str(tmp_path / 'data')}
    log, second = tmp_path / 'logs/plain-0.json', tmp_path / 'work/plain-0/epoch_2.pth'

    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        while not second.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert second.exists()
    assert not log.exists()

    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    found = json.loads(log.read_text())
    assert [entry['epoch'] for entry in found['evaluations']] == [1, 2, 3]
    assert [entry['iteration'] for entry in found['training']] == [1, 2, 3, 4, 5, 6]
    assert found['seconds_per_step'] > 0
    before = log.stat().st_mtime_ns
    subprocess.run(command, env=env, check=True)
    assert log.stat().st_mtime_ns == before
