"""docs/own_data.md, followed on generated images."""

import json
import os
import re
import shlex
import shutil
from argparse import ArgumentParser
from types import SimpleNamespace

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config, DictAction

from mmdet_odconv import ODConv2d
from mmdet_odconv.safe_running import require_datasets
from tests.conftest import ROOT
from tests.test_tools.test_train_and_test import run_tool

PAGE = (ROOT / 'docs/own_data.md').read_text()
SMALL_DETECTOR = 'Small and offline'
CLASSES = ('circle', 'square', 'triangle', 'star', 'cross')
SMALL = [
    'train_cfg.max_epochs=1',
    'train_cfg.val_interval=1',
    'model.backbone.init_cfg=None',
    'model.backbone.frozen_stages=0',
    'default_hooks.checkpoint.interval=1',
    *(
        f'{name}_dataloader.{option}'
        for name in ('train', 'val', 'test')
        for option in ('num_workers=0', 'persistent_workers=False')
    ),
]


def section(title):
    return PAGE.partition(f'\n## {title}\n')[2].partition('\n## ')[0]


def commands(title):
    text = '\n'.join(re.findall(r'```shell\n(.*?)```', section(title), re.DOTALL))
    return [shlex.split(line) for line in text.replace('\\\n', '').splitlines() if line]


@pytest.fixture(scope='module')
def own(tmp_path_factory):
    """A folder as the page wants it, and the configs with its classes and smaller images."""
    root = tmp_path_factory.mktemp('own_data')
    data = root / 'data/own'
    run_tool('study/make_shapes_dataset.py', data, '--train', 8, '--val', 4, '--size', 96, 96)
    for part in ('train', 'val'):
        (data / f'annotations/instances_{part}.json').rename(data / f'annotations/{part}.json')
    shutil.copytree(ROOT / 'configs', root / 'configs')
    path = root / 'configs/_base_/datasets/own_detection.py'
    text = path.read_text()
    for old, new in (("('cat', 'dog')", repr(CLASSES)), ('scale = (640, 640)', 'scale = (96, 96)')):
        assert old in section(SMALL_DETECTOR)
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return SimpleNamespace(root=root, data=data)


def test_a_folder_of_images_is_split(tmp_path, monkeypatch):
    images = [dict(id=i + 7, file_name=f'day{i % 2}/{i}.jpg') for i in range(10)]
    boxes = [dict(id=i, image_id=i + 7, bbox=[0, 0, 4, 4]) for i in range(10)]
    root = tmp_path / 'data/own'
    (root / 'annotations').mkdir(parents=True)
    labels = dict(images=images, annotations=boxes, categories=[dict(id=1, name='cat')])
    (root / 'annotations/all.json').write_text(json.dumps(labels))
    for image in images:
        (root / 'images' / image['file_name']).parent.mkdir(parents=True, exist_ok=True)
        (root / 'images' / image['file_name']).touch()
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r'```python title="split.py"\n(.*?)```', PAGE, re.DOTALL)
    exec(code, {})
    seen = []
    for part in ('train', 'val'):
        found = json.loads((root / f'annotations/{part}.json').read_text())
        ids = [image['id'] for image in found['images']]
        assert [box['image_id'] for box in found['annotations']] == ids
        assert all((root / part / image['file_name']).is_file() for image in found['images'])
        seen.append(ids)
    assert seen[1] == [11, 16]  # every fifth
    assert sorted(seen[0] + seen[1]) == list(range(7, 17))


@pytest.mark.slow
@pytest.mark.usefixtures('_onnx_export')
def test_a_small_detector(own, monkeypatch):
    monkeypatch.chdir(own.root)
    (pip, *_), (_, converter, arch), *walk, longer, _, _, _, _ = commands(SMALL_DETECTOR)
    assert pip == 'pip'
    assert (ROOT / converter).is_file()
    assert arch == 'lite0'
    names = [os.path.basename(command[1]) for command in walk]
    assert names == ['train.py', 'test.py', 'image_demo.py', 'export_onnx.py', 'test.py']
    work_dir = own.root / 'work_dirs/retinanet_od_efficientnet-lite0_k1_own'
    for command in walk:
        args = [arg.replace('epoch_20', 'epoch_1') for arg in command[2:]]
        run_tool(command[1].removeprefix('tools/'), *args, '--cfg-options', *SMALL, folder=own.root)
    assert (work_dir / 'epoch_1.pth').is_file()
    assert len([*(own.root / 'outputs').glob('*.png')]) == 4
    config = Config.fromfile(own.root / longer[2])
    config.merge_from_dict(dict(option.split('=') for option in longer[4:]))


def test_the_plain_twin_and_a_larger_backbone(own, monkeypatch):
    monkeypatch.chdir(own.root)
    register_all_modules()
    *_, plain, _, (_, _, arch), larger = commands(SMALL_DETECTOR)
    parser = ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    options = parser.parse_args(larger[larger.index('--cfg-options') :]).cfg_options
    checkpoint = options['model.backbone.init_cfg.checkpoint']
    assert checkpoint == f'checkpoints/efficientnet-{arch}.pth'
    for path, merged in ((plain[2], {}), (larger[2], options)):
        config = Config.fromfile(own.root / path)
        config.merge_from_dict(merged)
        config.model.backbone.init_cfg = None
        detector = MODELS.build(config.model)
        assert not any(isinstance(m, ODConv2d) for m in detector.modules())
        assert detector.bbox_head.num_classes == len(CLASSES)
        detector.extract_feat(torch.zeros(1, 3, 64, 64))


def zoo_config(own):
    blocks = re.findall(r'```python\n(.*?)```', section('A detector of the zoo'), re.DOTALL)
    assert len(blocks) == 2
    text = '\n'.join(blocks).replace("('cat', 'dog')", repr(CLASSES))
    path = own.root / 'own_yolox.py'
    path.write_text(text.replace('num_classes=2', 'num_classes=5'))
    return Config.fromfile(path)


def test_a_detector_of_the_zoo_is_shortened_and_shrunk(own, monkeypatch):
    monkeypatch.chdir(own.root)
    register_all_modules()
    config = zoo_config(own)
    require_datasets(config)
    assert any(isinstance(m, ODConv2d) for m in MODELS.build(config.model).modules())
    # The schedule ends where the training does, and each part begins where the one before ends.
    warm_up, cosine, constant = config.param_scheduler
    assert (warm_up.end, cosine.end, constant.end) == (1, 25, 30)
    assert (cosine.begin, constant.begin) == (warm_up.end, cosine.end)
    assert config.train_cfg.max_epochs == constant.end
    assert config.custom_hooks[0].type == 'YOLOXModeSwitchHook'
    assert config.custom_hooks[0].num_last_epochs == constant.end - constant.begin
    # No transform is left with the old size.
    for pipeline in (
        config.train_dataloader.dataset.pipeline,
        config.val_dataloader.dataset.pipeline,
        config.test_dataloader.dataset.pipeline,
    ):
        sizes = {t.get('img_scale', t.get('scale', (320, 320))) for t in pipeline}
        assert sizes == {(320, 320)}
    assert config.train_dataloader.dataset.pipeline[1].border == (-160, -160)
    assert config.model.data_preprocessor.batch_augments[0].random_size_range == (256, 384)
    assert config.train_dataloader.dataset.dataset.metainfo.classes == CLASSES
