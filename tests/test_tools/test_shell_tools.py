"""The shell tools: the command that they start, and what they say when something is missing."""

import os
import subprocess

import pytest

from tests.conftest import ROOT


@pytest.fixture
def run(tmp_path):
    """Run a shell tool where ``python`` and ``srun`` only print their arguments."""
    for name in ('python', 'srun'):
        path = tmp_path / name
        path.write_text('#!/bin/sh\necho "$(basename "$0")" "$@" "port=$MASTER_PORT"\n')
        path.chmod(0o755)

    def run(line, **env):
        tool, *args = line.split()
        path = f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'
        return subprocess.run(
            ['bash', str(ROOT / 'tools' / tool), *args],
            capture_output=True,
            text=True,
            env=dict(PATH=path) | env,
        )

    return run


HOSTS = dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='10.0.0.1', PORT='29600')
ONE = '--nnodes 1 --node_rank 0 --nproc_per_node 8 --master_addr 127.0.0.1 --master_port 29500'


@pytest.mark.parametrize(
    ('line', 'env', 'expected'),
    [
        ('dist_train.sh c.py 8 --amp', {}, [ONE, 'train.py c.py --amp --launcher pytorch']),
        ('dist_test.sh c.py w.pth 8', {}, [ONE, 'test.py c.py w.pth --launcher pytorch']),
        (
            'dist_train.sh c.py 4',
            HOSTS,
            ['--nnodes 2 --node_rank 1 --nproc_per_node 4 --master_addr 10.0.0.1', '_port 29600'],
        ),
        (
            'slurm_train.sh part job c.py work --resume',
            dict(GPUS='16', PORT='29700'),
            [
                'srun -p part --job-name job --nodes 2 --ntasks 16 --ntasks-per-node 8',
                '--gres gpu:8',
                'train.py c.py --work-dir work --resume --launcher slurm port=29700',
            ],
        ),
        (
            'slurm_test.sh part job c.py w.pth',
            dict(GPUS='4', NNODES='2', SRUN_ARGS='--exclusive --time=60'),
            [
                '--nodes 2 --ntasks 4 --ntasks-per-node 2 --gres gpu:2',
                '--exclusive --time=60 python',
                'test.py c.py w.pth --launcher slurm port=29500',
            ],
        ),
        ('slurm_train.sh part job c.py work', dict(GPUS='2'), ['--nodes 1 --ntasks 2', 'gpu:2']),
    ],
)
def test_the_command_that_is_started(run, line, env, expected):
    result = run(line, **env)
    assert result.returncode == 0, result.stderr
    for part in expected:
        assert part in result.stdout


@pytest.mark.parametrize(
    ('line', 'env', 'message'),
    [
        ('dist_train.sh', {}, 'dist_train.sh: CONFIG is missing; usage: '),
        ('dist_train.sh c.py --amp', {}, "GPUS must be a number from 1 on, got '--amp'"),
        ('dist_test.sh c.py 8', {}, 'dist_test.sh: GPUS is missing; usage: '),
        ('slurm_train.sh part job c.py', {}, 'slurm_train.sh: WORK_DIR is missing; usage: '),
        ('slurm_test.sh part job c.py', {}, 'slurm_test.sh: CHECKPOINT is missing; usage: '),
        ('dist_train.sh c.py 8', dict(NNODES='2'), 'NNODES=2 needs NODE_RANK, another on each'),
        ('dist_train.sh c.py 8', HOSTS | dict(NODE_RANK='2'), "from 0 to 1, got '2'"),
        ('dist_train.sh c.py 8', HOSTS | dict(MASTER_ADDR=''), 'NNODES=2 needs MASTER_ADDR'),
        ('slurm_train.sh p j c.py w', dict(GPUS='12'), 'GPUS=12 must be NNODES times GPUS_PER_'),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(run, line, env, message):
    result = run(line, **env)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count('\n') == 1
    assert not result.stdout
