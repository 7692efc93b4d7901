"""Checkpoints that are damaged, hostile or of another detector, given to the tools."""

import os
import shutil

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config

from tests.conftest import ROOT
from tests.forked_tools import Tools
from tests.test_safe_running.test_reading import Hostile
from tests.test_tools.test_train_and_test import CONFIG


@pytest.fixture(scope='module')
def tools(tmp_path_factory):
    """A few images, and a detector as it is built in ``whole.pth``."""
    tools = Tools.with_images(tmp_path_factory.mktemp('broken'), train=2, val=2)
    model = Config.fromfile(ROOT / CONFIG).model
    model.backbone.base_channels = 8
    model.neck.in_channels = [8, 16, 32, 64]
    content = dict(meta=dict(epoch=1, iter=1), state_dict=MODELS.build(model).state_dict())
    torch.save(content, tools.root / 'whole.pth')
    return tools


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


def of_other_classes(path):
    content = torch.load(path)
    for name in ('weight', 'bias'):
        value = content['state_dict'][f'bbox_head.retina_cls.{name}']
        content['state_dict'][f'bbox_head.retina_cls.{name}'] = torch.cat([value, value])
    torch.save(content, path)


def of_another_k(path):
    content = torch.load(path)
    for name, value in content['state_dict'].items():
        if value.dim() == 5:
            content['state_dict'][name] = value[:2]
    torch.save(content, path)


BROKEN = {
    truncated: 'cannot be read as a checkpoint',
    with_nan: 'backbone.conv1.weight has values that are not finite',
    of_another_detector: 'is not in the file',
    of_other_classes: 'size mismatch for bbox_head.retina_cls.weight: copying a param with shape',
    of_another_k: 'size mismatch for backbone.',
    hostile: 'nothing of it was run',
}


@pytest.fixture
def broken(tools, tmp_path):
    return shutil.copy(tools.root / 'whole.pth', tmp_path / 'broken.pth')


def check_ends_in_one_line(tools, path, message, tool, *args, **kwargs):
    """It ends with a sentence about the file, has written nothing and run nothing of it."""
    before = results(path.parent)
    assert tools.start(tool, *args, trusting=True, **kwargs).wait() == 1
    assert str(path) in tools.last_line()
    assert message in tools.last_line()
    assert 'Traceback' not in tools.log()
    assert not path.with_name('proof').exists()
    assert results(path.parent) == before


def results(folder):
    return {file for file in folder.rglob('*') if file.suffix in ('.pth', '.png', '.onnx')}


@pytest.mark.parametrize('spoil', BROKEN)
@pytest.mark.parametrize('tool', ['train.py', 'test.py', 'image_demo.py'])
def test_every_tool_names_it_in_one_line(tools, broken, spoil, tool):
    spoil(broken)
    args = {
        'train.py': [tools.config, '--resume', broken, '--work-dir'],
        'test.py': [tools.config, broken, '--work-dir'],
        'image_demo.py': [tools.shapes / 'val', tools.config, broken, '--out-dir'],
    }[tool]
    check_ends_in_one_line(tools, broken, BROKEN[spoil], tool, *args, broken.parent / 'out')


def test_an_onnx_file_is_not_made_of_it(tools, broken):
    for package in ('onnx', 'onnxruntime', 'onnxscript'):
        pytest.importorskip(package)
    of_another_k(broken)
    args = (tools.config, broken, '--out', broken.with_suffix('.onnx'))
    check_ends_in_one_line(tools, broken, BROKEN[of_another_k], 'deployment/export_onnx.py', *args)


@pytest.mark.parametrize('spoil', [truncated, hostile])
@pytest.mark.parametrize(
    'options',
    [['load_from={}'], ['model.init_cfg.type=Pretrained', 'model.init_cfg.checkpoint={}']],
    ids=['load_from', 'init_cfg'],
)
def test_a_training_does_not_start_from_it(tools, broken, spoil, options):
    spoil(broken)
    options = [option.format(broken) for option in options]
    args = ('train.py', tools.config, '--work-dir', broken.parent)
    check_ends_in_one_line(tools, broken, BROKEN[spoil], *args, options=options)


@pytest.mark.parametrize('spoil', [truncated, hostile])
def test_a_training_does_not_go_on_from_it_as_the_latest(tools, broken, spoil):
    spoil(broken)
    args = ('train.py', tools.config, '--resume', '--work-dir', broken.parent)
    check_ends_in_one_line(tools, broken, BROKEN[spoil], *args)
