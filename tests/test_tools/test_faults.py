"""The tools in trainings that are killed, on full disks, with broken images and files.

They run in processes forked from this one, so that none has to import MMDetection again.
"""

import json
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import threading

import pytest
import torch
from mmdet.utils import register_all_modules
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from tests.conftest import ROOT
from tests.test_checkpoint.test_reading import Hostile
from tests.test_tools.test_train_and_test import CONFIG, SMALL, run_tool
from tests.tiny_training import InChild, assert_equal_bit_for_bit, weights_of

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]

OPTIONS = [*SMALL, 'train_dataloader.batch_size=2']
EPOCHS, BATCHES = 4, 6


@HOOKS.register_module()
class DisturbHook(Hook):
    """Sends this process a signal some seconds after an iteration has begun."""

    def __init__(self, iterations, seconds, number):
        self.iterations, self.seconds, self.number = iterations, seconds, number

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.iterations -= 1
        if self.iterations == 0:
            send = lambda: os.kill(os.getpid(), self.number)  # noqa: E731
            threading.Timer(self.seconds, send).start()


def run(name, log, args, shapes, file_size=None):
    """One of the tools, as its own process would be; its output goes to a file."""
    sys.stdout = sys.stderr = file = log.open('w', buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    os.environ['SHAPES_ROOT'] = str(shapes)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.argv = [name, *map(str, args)]
    runpy.run_path(str(ROOT / 'tools' / name), run_name='__main__')


class Tools:
    """The tools on a folder of generated images.

    Args:
        root (Path): Where logs go.
        shapes (Path): The images.
    """

    def __init__(self, root, shapes):
        self.root, self.shapes = root, shapes
        self.config = root / 'config.py'
        self.config.write_text(
            f'_base_ = {str(ROOT / CONFIG)!r}\n'
            "custom_hooks = [dict(type='ODConvTemperatureHook', anneal_iters=20)]\n"
        )

    def start(self, name, *args, options=(), file_size=None):
        args = [*args, '--cfg-options', *OPTIONS, *options]
        return InChild(run, name, self.root / 'log', args, self.shapes, file_size)

    def train(self, work_dir, *args, epochs=EPOCHS, disturb=None, **kwargs):
        """Train and return the exit status."""
        options = [f'train_cfg.max_epochs={epochs}', *kwargs.pop('options', ())]
        if disturb:
            keys = ('iterations', 'seconds', 'number')
            options += ['default_hooks.disturb.type=DisturbHook']
            options += [
                f'default_hooks.disturb.{key}={value}'
                for key, value in zip(keys, disturb, strict=True)
            ]
        work = ['--work-dir', work_dir]
        return self.start('train.py', self.config, *work, *args, options=options, **kwargs).wait()

    def log(self):
        return (self.root / 'log').read_text()

    def last_line(self):
        return self.log().strip().rpartition('\n')[2]


@pytest.fixture(scope='module')
def tools(tmp_path_factory):
    """Twelve images, and a run on them that nothing disturbs in its folder ``whole``."""
    register_all_modules(init_default_scope=False)
    root = tmp_path_factory.mktemp('faults')
    shapes = root / 'shapes'
    run_tool('make_shapes_dataset.py', shapes, '--train', 12, '--val', 4, '--size', 64, 64)
    tools = Tools(root, shapes)
    assert tools.train(root / 'whole') == 0, tools.log()[-3000:]
    return tools


@pytest.fixture
def saved(tools, tmp_path):
    """A work folder with a run of two epochs."""
    work_dir = tmp_path / 'saved'
    assert tools.train(work_dir, epochs=2) == 0, tools.log()[-3000:]
    return work_dir


def checkpoints(work_dir):
    paths = [*work_dir.glob('*.pth'), work_dir / 'last_checkpoint']
    return {path.name: path.read_bytes() for path in paths if path.exists()}


def check_resumes_to_the_same_bits(tools, work_dir):
    assert tools.train(work_dir, '--resume') == 0, tools.log()[-3000:]
    name = f'epoch_{EPOCHS}.pth'
    expected = weights_of(tools.root / 'whole' / name)
    assert any(key.endswith('temperature') for key in expected)
    assert_equal_bit_for_bit(weights_of(work_dir / name), expected)


def test_many_kills_in_one_run(tools, tmp_path):
    chance, kills, exit_code = random.Random(2), 0, None
    while exit_code != 0:
        assert kills < 60
        # Three of four lives end before their first epoch does.
        moment = (chance.randint(1, BATCHES + 2), chance.uniform(0, 0.1), int(signal.SIGKILL))
        exit_code = tools.train(tmp_path, '--resume', disturb=moment)
        assert exit_code in (0, -signal.SIGKILL), tools.log()[-3000:]
        kills += exit_code != 0
    print(f'{kills} kills survived')
    assert kills >= 10
    check_resumes_to_the_same_bits(tools, tmp_path)


@pytest.mark.parametrize('iterations', [1, 4, BATCHES, 2 * BATCHES + 3])
def test_sigterm(tools, tmp_path, iterations):
    moment = (iterations, 0, int(signal.SIGTERM))
    assert tools.train(tmp_path, disturb=moment) == 99
    assert '--resume goes on from' in tools.last_line()
    latest = (tmp_path / 'last_checkpoint').read_text()
    assert torch.load(latest)['meta']['iter'] in (iterations, iterations + 1)
    check_resumes_to_the_same_bits(tools, tmp_path)


def test_a_full_disk(tools, saved):
    before = checkpoints(saved)
    assert tools.train(saved, '--resume', file_size=100_000) == 1
    assert 'epoch_3.pth' in tools.last_line()
    assert 'cannot be saved: File too large; all earlier checkpoints are' in tools.last_line()
    assert checkpoints(saved) == before
    check_resumes_to_the_same_bits(tools, saved)


def test_a_run_without_a_seed_goes_on_with_its_own(tools, tmp_path):
    """MMEngine draws one and saves it."""
    options = ['randomness.seed=None']
    assert tools.train(tmp_path, epochs=1, options=options) == 0
    shutil.copytree(tmp_path, tools.root / 'seedless')
    for work_dir in (tmp_path, tools.root / 'seedless'):
        assert tools.train(work_dir, '--resume', epochs=3, options=options) == 0
    states = [weights_of(folder / 'epoch_3.pth') for folder in (tmp_path, tools.root / 'seedless')]
    assert_equal_bit_for_bit(*states)


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


def with_nan(path):
    content = torch.load(path)
    content['state_dict']['backbone.conv1.weight'].view(-1)[0] = float('nan')
    torch.save(content, path)


def of_another_detector(path):
    content = torch.load(path)
    state = content['state_dict']
    content['state_dict'] = {k.replace('bbox_head', 'roi_head'): v for k, v in state.items()}
    torch.save(content, path)


def hostile(path):
    content = torch.load(path)
    content['meta']['cfg'] = Hostile(path.with_name('proof'))
    torch.save(content, path)


def of_another_k(path):
    content = torch.load(path)
    for name, value in content['state_dict'].items():
        if value.dim() == 5:
            content['state_dict'][name] = value[:2]
    torch.save(content, path)


BROKEN = {
    truncated: 'cannot be read as a checkpoint',
    with_nan: 'values that are not finite, such as backbone.conv1.weight',
    of_another_detector: 'weights of the model are not in the file, such as bbox_head',
    of_another_k: 'banks have K=2 in the file, K=4 in the config',
    hostile: 'nothing of it was run',
}


@pytest.mark.parametrize('spoil', BROKEN)
@pytest.mark.parametrize('tool', ['train.py', 'test.py', 'image_demo.py'])
def test_broken_checkpoints_are_named_in_one_line(tools, tmp_path, spoil, tool):
    path, out = tmp_path / 'broken.pth', tmp_path / 'out'
    shutil.copy(tools.root / 'whole' / f'epoch_{EPOCHS}.pth', path)
    spoil(path)
    args = {
        'train.py': [tools.config, '--resume', path, '--work-dir', out],
        'test.py': [tools.config, path, '--work-dir', out],
        'image_demo.py': [tools.shapes / 'val', tools.config, path, '--out-dir', out],
    }[tool]
    assert tools.start(tool, *args).wait() == 1
    assert str(path) in tools.last_line()
    assert BROKEN[spoil] in tools.last_line()
    assert 'Traceback' not in tools.log()
    assert not (tmp_path / 'proof').exists()
    assert not list(out.rglob('*.p[nt][gh]'))


def test_a_damaged_latest_checkpoint_is_passed_over(tools, saved):
    """As a kill during a save leaves it without the hook."""
    truncated(saved / 'epoch_2.pth')
    assert tools.train(saved, '--resume') == 0
    assert 'epoch_2.pth cannot be read as a checkpoint' in tools.log()
    check_resumes_to_the_same_bits(tools, saved)


@pytest.fixture
def spoilt(tools, tmp_path):
    """The tools on a copy of the images, which a test may spoil, and a function to do so."""
    shapes = tmp_path / 'shapes'
    shutil.copytree(tools.shapes, shapes)
    other = Tools(tmp_path, shapes)
    path = shapes / 'annotations/instances_train.json'

    def change(function):
        content = json.loads(path.read_text())
        function(content)
        path.write_text(json.dumps(content))

    other.change = change
    other.image = shapes / 'train' / json.loads(path.read_text())['images'][0]['file_name']
    return other


def box(values):
    def change(content):
        for annotation in content['annotations'][:3]:
            annotation['bbox'] = values

    return change


def of_no_class(content):
    for annotation in content['annotations'][:3]:
        annotation['category_id'] = 99


def without_objects(content):
    first = content['images'][0]['id']
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] != first]


@pytest.mark.parametrize(
    'change',
    [box([5, 5, 0, 0]), box([900, 900, 10, 10]), box([5, 5, -3, 8]), of_no_class, without_objects],
    ids=['no area', 'outside', 'negative width', 'unknown category', 'no objects'],
)
def test_odd_annotations_are_left_out(spoilt, change):
    spoilt.change(change)
    assert spoilt.train(spoilt.root / 'work', epochs=1) == 0, spoilt.log()[-3000:]
    assert 'loss: nan' not in spoilt.log()


@pytest.mark.parametrize('content', [b'', b'no picture'])
def test_an_image_that_cannot_be_read_is_named(spoilt, content):
    work_dir = spoilt.root / 'work'
    assert spoilt.train(work_dir, epochs=1) == 0
    before = checkpoints(work_dir)
    spoilt.image.write_bytes(content)
    assert spoilt.train(work_dir, '--resume', epochs=2) == 1
    assert str(spoilt.image) in spoilt.last_line()
    assert checkpoints(work_dir) == before


def test_half_an_image_is_trained_on_or_named(spoilt):
    truncated(spoilt.image)
    exit_code = spoilt.train(spoilt.root / 'work', epochs=1)
    assert exit_code == 0 or str(spoilt.image) in spoilt.last_line()


def test_boxes_that_are_no_numbers_stop_the_run_before_they_reach_the_weights(spoilt):
    spoilt.change(box([float('nan'), 5, 10, 10]))
    exit_code = spoilt.train(spoilt.root / 'work', epochs=1)
    if exit_code == 0:
        weights = weights_of(spoilt.root / 'work/epoch_1.pth')
        assert all(value.isfinite().all() for value in weights.values())
    else:
        assert 'the loss of iteration' in spoilt.last_line()
        assert str(spoilt.image) in spoilt.last_line()
        assert not checkpoints(spoilt.root / 'work')
