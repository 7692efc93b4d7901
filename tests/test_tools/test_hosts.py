"""Two hosts, as network namespaces with a cable between them, one of which is cut off."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from tests.conftest import ROOT
from tests.test_tools.test_train_and_test import CONFIG, SMALL, run_tool
from tests.tiny_training import assert_equal_bit_for_bit, weights_of

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]

EPOCHS, BATCHES = 3, 3
# Seconds that a process waits for the others: also while they import MMDetection.
PATIENCE = 120
ADDRESSES = '10.213.77.1', '10.213.77.2'


@HOOKS.register_module()
class CutOffHook(Hook):
    """Takes the host off the network, or kills all of it, in the middle of the second epoch."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter != BATCHES + 1:
            return
        if os.environ.get('CUT_OFF') == 'cable':
            subprocess.run(['ip', 'link', 'set', 'eth0', 'down'], check=True)
        elif os.environ.get('CUT_OFF') == 'power':
            os.kill(os.getppid(), signal.SIGKILL)  # torchrun
            os.kill(os.getpid(), signal.SIGKILL)


class Hosts:
    """Two namespaces, and trainings in them.

    Args:
        root (Path): Where images, work folders and logs go, the disk that both hosts share.
    """

    def __init__(self, root):
        self.root, self.running = root, []
        self.names = [f'odconv-{os.getpid()}-{rank}' for rank in (0, 1)]
        config = root / 'config.py'
        config.write_text(
            f'_base_ = {str(ROOT / CONFIG)!r}\n'
            f"custom_imports = dict(imports=['mmdet_odconv', {__name__!r}])\n"
            "custom_hooks = [dict(type='ODConvTemperatureHook', anneal_iters=8),\n"
            "                dict(type='CutOffHook')]\n"
            f"env_cfg = dict(dist_cfg=dict(backend='gloo', timeout={PATIENCE}))\n"
        )
        options = [*SMALL, 'train_dataloader.batch_size=2', f'train_cfg.max_epochs={EPOCHS}']
        self.arguments = [config, '--cfg-options', *options]

    def ip(self, rank, *args):
        subprocess.run(['ip', '-n', self.names[rank], *args], check=True)

    def connect(self):
        link = ['link', 'add', 'eth0', 'type', 'veth', 'peer', 'name', 'eth0', 'netns']
        self.ip(0, *link, self.names[1])
        for rank in (0, 1):
            self.ip(rank, 'addr', 'add', f'{ADDRESSES[rank]}/24', 'dev', 'eth0')
            for device in ('lo', 'eth0'):
                self.ip(rank, 'link', 'set', device, 'up')

    def start(self, rank, command, **env):
        """A command on one of the hosts."""
        path = f'{os.path.dirname(sys.executable)}{os.pathsep}{os.environ["PATH"]}'
        env = dict(os.environ, PATH=path, PYTHONPATH=str(ROOT), GLOO_SOCKET_IFNAME='eth0') | env
        env['SHAPES_ROOT'] = str(self.root / 'shapes')
        with self.log(rank).open('w') as log:
            process = subprocess.Popen(
                ['ip', 'netns', 'exec', self.names[rank], *map(str, command)],
                cwd=ROOT,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.running.append(process)
        return process

    def log(self, rank):
        return self.root / f'log{rank}'

    def train(self, work_dir, *args, cut_off=''):
        """Train by dist_train.sh on both hosts, and return their exit statuses."""
        config, *options = self.arguments
        command = ['tools/dist_train.sh', config, 1, '--work-dir', work_dir, *args, *options]
        env = dict(NNODES='2', MASTER_ADDR=ADDRESSES[0], PORT='29533')
        hosts = [
            self.start(rank, command, NODE_RANK=str(rank), CUT_OFF=cut_off * rank, **env)
            for rank in (0, 1)
        ]
        return [host.wait(1000) for host in hosts]

    def tail(self):
        return '\n'.join(self.log(rank).read_text()[-3000:] for rank in (0, 1))

    def close(self):
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for name in self.names:
            subprocess.run(['ip', 'netns', 'del', name], stderr=subprocess.DEVNULL)


@pytest.fixture(scope='module')
def hosts(tmp_path_factory):
    """Twelve images, and a training by both hosts that nothing disturbs in the folder ``whole``."""
    if shutil.which('ip') is None:
        pytest.skip('there is no command ip (iproute2)')
    if os.geteuid() != 0:
        pytest.skip('network namespaces need root')
    hosts = Hosts(tmp_path_factory.mktemp('hosts'))
    try:
        for name in hosts.names:
            made = subprocess.run(['ip', 'netns', 'add', name], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f'network namespaces cannot be made here: {made.stderr.strip()}')
        hosts.connect()
        shapes = hosts.root / 'shapes'
        run_tool(
            'study/make_shapes_dataset.py', shapes, '--train', 12, '--val', 4, '--size', 64, 64
        )
        assert hosts.train(hosts.root / 'whole') == [0, 0], hosts.tail()
        yield hosts
    finally:
        hosts.close()


def check_same_bits(hosts, work_dir):
    states = [weights_of(d / f'epoch_{EPOCHS}.pth') for d in (work_dir, hosts.root / 'whole')]
    assert_equal_bit_for_bit(*states)


def test_a_host_without_network_ends_the_run_which_goes_on_later(hosts, tmp_path):
    start = time.monotonic()
    assert hosts.train(tmp_path, cut_off='cable') == [1, 1], hosts.tail()
    print(f'ended after {time.monotonic() - start:.0f} s')
    assert f'Timed out waiting {PATIENCE}000ms' in hosts.log(0).read_text()
    assert [path.name for path in tmp_path.glob('epoch_*.pth')] == ['epoch_1.pth']
    hosts.ip(1, 'link', 'set', 'eth0', 'up')
    assert hosts.train(tmp_path, '--resume') == [0, 0], hosts.tail()
    assert f'resumed epoch: 1, iter: {BATCHES}' in hosts.log(0).read_text()
    check_same_bits(hosts, tmp_path)


def test_a_killed_host_joins_again_while_the_other_waits(hosts, tmp_path):
    """torchrun's own restart, as docs/distributed.md has it."""

    def start(rank, cut_off=''):
        config, *options = hosts.arguments
        command = [
            *('torchrun', '--nnodes', 2, '--nproc-per-node', 1, '--max-restarts', 3),
            *('--rdzv-backend', 'c10d', '--rdzv-endpoint', f'{ADDRESSES[0]}:29544'),
            *('--rdzv-id', 'shapes', '--rdzv-conf', f'is_host={str(rank == 0).lower()}'),
            *('--local-addr', ADDRESSES[rank], 'tools/train.py', config, '--launcher', 'pytorch'),
            *('--resume', '--work-dir', tmp_path, *options),
        ]
        # Else a torchrun that starts anew waits for an address that the first round had.
        env = dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1', CUT_OFF=cut_off)
        return hosts.start(rank, command, **env)

    first, second = start(0), start(1, cut_off='power')
    assert second.wait(1000) == -signal.SIGKILL, hosts.tail()
    second = start(1)
    assert [first.wait(1000), second.wait(1000)] == [0, 0], hosts.tail()
    assert f'resumed epoch: 1, iter: {BATCHES}' in hosts.log(0).read_text()
    check_same_bits(hosts, tmp_path)
