"""docs/recipes.md, followed on generated images."""

import re
import shlex

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from mmdet_odconv import ODConv2d
from tests.conftest import ROOT
from tests.test_tools.test_train_and_test import run_tool

PAGE = (ROOT / 'docs/recipes.md').read_text()
STATIC = """
_base_ = [
    './configs/_base_/models/retinanet_tiny.py',
    './configs/_base_/datasets/shapes_detection.py',
    './configs/_base_/schedules/schedule_small.py',
    './configs/_base_/runtime_small.py',
]
model = dict(bbox_head=dict(num_classes=5))
"""


@pytest.mark.slow
def test_a_trained_detector_is_fine_tuned(tmp_path):
    section = PAGE.partition('## Fine-tune a trained detector')[2].partition('\n## ')[0]
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    (tmp_path / 'my_detector.py').write_text(STATIC)
    (code,) = re.findall(r'```python title="fine_tuned.py"\n(.*?)```', section, re.DOTALL)
    (tmp_path / 'fine_tuned.py').write_text(code)
    register_all_modules()
    static = MODELS.build(Config.fromfile(tmp_path / 'my_detector.py').model)
    checkpoint = tmp_path / 'work_dirs/my_detector/epoch_12.pth'
    checkpoint.parent.mkdir(parents=True)
    torch.save({'state_dict': static.state_dict()}, checkpoint)

    shapes = tmp_path / 'shapes'
    run_tool('study/make_shapes_dataset.py', shapes, '--train', 8, '--val', 4, '--size', 64, 64)
    (commands,) = re.findall(r'```shell\n(.*?)```', section, re.DOTALL)
    command = shlex.split(commands.replace('\\\n', '').splitlines()[-1])[2:]
    assert command[:2] == ['fine_tuned.py', '--work-dir']
    run_tool(
        'train.py',
        *command,
        'max_epochs=1',
        'train_cfg.max_epochs=1',
        shapes=shapes,
        folder=tmp_path,
    )
    config = Config.fromfile(tmp_path / command[2] / 'fine_tuned.py')
    assert config.optim_wrapper.optimizer.lr == 0.0003
    trained = MODELS.build(config.model)
    (last,) = (tmp_path / command[2]).glob('epoch_*.pth')
    trained.load_state_dict(torch.load(last)['state_dict'])
    layers = [m for m in trained.modules() if isinstance(m, ODConv2d)]
    assert layers
    # A few steps from the static weights: the mean of a bank is still near the static kernel.
    layer, kernel = trained.backbone.layer2[0].conv1, static.backbone.layer2[0].conv1.weight
    mixed = layer.weight.mean(0) * layer.attention.constant_product()
    assert torch.allclose(mixed, kernel, atol=0.1 * float(kernel.std()))
