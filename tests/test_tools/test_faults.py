"""The tools in trainings that are killed, on full disks, with broken images and files."""

import json
import os
import random
import shutil
import signal
import threading

import pytest
import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from tests.forked_tools import BATCHES, EPOCHS, Tools
from tests.test_tools.test_broken_checkpoints import of_other_classes, truncated
from tests.tiny_training import assert_equal_bit_for_bit, weights_of

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]


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


@pytest.fixture(scope='module')
def tools(tmp_path_factory):
    """Twelve images, and a run on them that nothing disturbs in its folder ``whole``."""
    tools = Tools.with_images(tmp_path_factory.mktemp('faults'), train=12, val=4)
    assert tools.train(tools.root / 'whole') == 0, tools.log()[-3000:]
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


def test_a_damaged_latest_checkpoint_is_passed_over(tools, saved):
    """As a kill during a save leaves it without the hook."""
    truncated(saved / 'epoch_2.pth')
    assert tools.train(saved, '--resume') == 0
    assert 'epoch_2.pth cannot be read as a checkpoint' in tools.log()
    check_resumes_to_the_same_bits(tools, saved)


def test_load_from_with_other_classes_says_what_it_leaves_out(tools, tmp_path):
    path = tmp_path / 'other.pth'
    shutil.copy(tools.root / 'whole' / f'epoch_{EPOCHS}.pth', path)
    of_other_classes(path)
    assert tools.train(tmp_path / 'work', epochs=1, options=[f'load_from={path}']) == 0
    assert 'size mismatch for bbox_head.retina_cls.weight' in tools.log()
    assert 'size mismatch for backbone' not in tools.log()


@pytest.fixture
def spoilt(tools, tmp_path, monkeypatch):
    """The tools on a copy of the images, which a test may spoil, and a function to do so."""
    shapes = tmp_path / 'shapes'
    monkeypatch.setenv('SHAPES_ROOT', str(shapes))
    shutil.copytree(tools.shapes, shapes)
    other = Tools(tmp_path, shapes)
    path = shapes / 'annotations/instances_train.json'

    def change(function):
        content = json.loads(path.read_text())
        number = function(content)
        path.write_text(json.dumps(content))
        return number

    other.change = change
    other.image = shapes / 'train' / json.loads(path.read_text())['images'][0]['file_name']
    return other


def box(values):
    def change(content):
        for annotation in content['annotations'][:3]:
            annotation['bbox'] = values
        return 3

    return change


def of_no_class(content):
    for annotation in content['annotations'][:3]:
        annotation['category_id'] = 99
    return 3


def without_objects(content):
    first = content['images'][0]['id']
    left = [a for a in content['annotations'] if a['image_id'] != first]
    number = len(content['annotations']) - len(left)
    content['annotations'] = left
    return number


def objects(tools):
    """How many objects the training images have for MMDetection."""
    dataset = DATASETS.build(Config.fromfile(tools.config).train_dataloader.dataset)
    return sum(len(dataset.get_data_info(i)['instances']) for i in range(len(dataset)))


NAN, INF = float('nan'), float('inf')
ODD = {
    'no area': box([5, 5, 0, 0]),
    'outside': box([900, 900, 10, 10]),
    'negative width': box([5, 5, -3, 8]),
    'no number': box([NAN, 5, 10, 10]),
    'no number for its width': box([5, 5, NAN, 10]),
    'at an infinite place': box([5, INF, 10, 10]),
    'unknown category': of_no_class,
    'no objects': without_objects,
}


@pytest.mark.parametrize('change', ODD.values(), ids=ODD)
def test_odd_annotations_are_left_out(spoilt, change):
    before = objects(spoilt)
    number = spoilt.change(change)
    assert number > 0
    assert objects(spoilt) == before - number
    assert spoilt.train(spoilt.root / 'work', epochs=1) == 0, spoilt.log()[-3000:]
    assert 'loss: nan' not in spoilt.log()


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('content', [b'', b'no picture'])
def test_an_image_that_cannot_be_read_is_named(spoilt, content, workers):
    work_dir = spoilt.root / 'work'
    assert spoilt.train(work_dir, epochs=1) == 0
    before = checkpoints(work_dir)
    spoilt.image.write_bytes(content)
    options = [f'train_dataloader.num_workers={workers}']
    assert spoilt.train(work_dir, '--resume', epochs=2, options=options) == 1
    assert str(spoilt.image) in spoilt.last_line()
    assert checkpoints(work_dir) == before


def test_half_an_image_is_trained_on_or_named(spoilt):
    """OpenCV decides: some versions fill the rest with grey, others refuse it."""
    truncated(spoilt.image)
    exit_code = spoilt.train(spoilt.root / 'work', epochs=1)
    assert exit_code in (0, 1)
    assert exit_code == 0 or str(spoilt.image) in spoilt.last_line()


def test_an_infinite_box_ends_where_the_image_does(spoilt):
    spoilt.change(box([5, 5, INF, 10]))
    assert spoilt.train(spoilt.root / 'work', epochs=1) == 0, spoilt.log()[-3000:]
    weights = weights_of(spoilt.root / 'work/epoch_1.pth')
    assert all(value.isfinite().all() for value in weights.values())
