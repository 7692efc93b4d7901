"""The small real data sets: skipped, with the reason, where they are absent."""

import os
import subprocess
import sys

import pytest
from mmdet.registry import DATASETS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from tests.conftest import ROOT
from tests.test_tools.test_train_and_test import metrics, run_tool

SHORT = [
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'train_dataloader.batch_size=2',
    'train_dataloader.dataset.indices=4',
    'val_dataloader.num_workers=0',
    'val_dataloader.persistent_workers=False',
    'val_dataloader.dataset.indices=4',
    'train_cfg.max_epochs=1',
    'train_cfg.val_interval=1',
]


def build(config_name, variable, root, monkeypatch, folder='configs/odconv'):
    register_all_modules()
    monkeypatch.setenv(variable, str(root))
    config = Config.fromfile(ROOT / folder / config_name)
    return [
        DATASETS.build(config[loader].dataset) for loader in ('train_dataloader', 'val_dataloader')
    ]


def test_coco128_is_read_whole(coco128, monkeypatch):
    train, val = build('retinanet_od_r18_coco128.py', 'COCO128_ROOT', coco128, monkeypatch)
    assert len(val) == 128
    assert 120 < len(train) <= 128  # images without an object are left out of training
    assert len(train.metainfo['classes']) == 80
    sample = train[0]
    assert max(sample['inputs'].shape[1:]) == 256
    assert len(sample['data_samples'].gt_instances) > 0


def test_bccd_is_read_whole(bccd, monkeypatch):
    train, val = build('retinanet_od_mobilenetv2_bccd.py', 'BCCD_ROOT', bccd, monkeypatch)
    assert (len(train), len(val)) == (205, 87)
    assert train.metainfo['classes'] == ('RBC', 'WBC', 'Platelets')
    assert tuple(train[0]['inputs'].shape) == (3, 240, 320)


def test_deeppcb_is_read_whole(deeppcb, monkeypatch):
    train, val = build('deeppcb.py', 'DEEPPCB_ROOT', deeppcb, monkeypatch, 'tools/study')
    assert (len(train), len(val)) == (800, 200)
    classes = ('open', 'short', 'mousebite', 'spur', 'copper', 'pin-hole')
    assert train.metainfo['classes'] == classes
    sample = train[0]
    assert tuple(sample['inputs'].shape) == (3, 320, 320)
    labels = {int(n) for i in range(20) for n in train[i]['data_samples'].gt_instances.labels}
    assert labels == set(range(6))


@pytest.mark.slow
@pytest.mark.parametrize('detector', ['retinanet', 'faster-rcnn', 'mask-rcnn'])
def test_a_few_iterations_on_real_photographs(coco128, tmp_path, detector):
    result = subprocess.run(
        [
            *(sys.executable, 'tools/train.py', f'configs/odconv/{detector}_od_r18_coco128.py'),
            *('--work-dir', str(tmp_path), '--cfg-options', *SHORT),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, 'COCO128_ROOT': str(coco128)},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / 'epoch_1.pth').is_file()


# A small detector of small images, that finds something after a minute.
TINY = [
    'model.backbone.widen_factor=0.25',
    'model.neck.in_channels=[8,8,24,1280]',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'train_dataloader.dataset.pipeline.2.scale=(160,160)',
    'test_dataloader.num_workers=0',
    'test_dataloader.persistent_workers=False',
    'test_dataloader.dataset.pipeline.1.scale=(160,160)',
    'test_dataloader.dataset.indices=24',
    'train_cfg.max_epochs=4',
    'train_cfg.val_begin=5',
    'optim_wrapper.optimizer.lr=0.004',
    'param_scheduler.0.end=20',
    'randomness.seed=0',
]


@pytest.mark.slow
def test_a_static_detector_has_the_ap_of_its_odconv_twin(bccd, tmp_path, monkeypatch):
    monkeypatch.setenv('BCCD_ROOT', str(bccd))
    config, static = (
        'configs/odconv/retinanet_od_mobilenetv2_bccd.py',
        ['model.backbone.type=MobileNetV2'],
    )
    work_dir = tmp_path / 'static'
    run_tool('train.py', config, '--work-dir', work_dir, '--cfg-options', *TINY, *static)
    checkpoint = work_dir / 'epoch_4.pth'
    found = {}
    for name, options in (('plain', static), ('odconv', [])):
        folder = tmp_path / name
        run_tool(
            *('test.py', config, checkpoint, '--work-dir', folder),
            *('--cfg-options', *TINY, *options),
        )
        found[name] = {k: v for k, v in metrics(folder).items() if k.startswith('coco/')}
    assert found['plain']['coco/bbox_mAP'] > 0
    assert found['odconv'] == pytest.approx(found['plain'], abs=5e-4)


def test_hituav_is_read_whole(hituav, monkeypatch):
    name = 'retinanet_od_efficientnet-lite0_k1_hituav.py'
    train, val = build(name, 'HITUAV_ROOT', hituav, monkeypatch)
    assert 2000 < len(train) <= 2029  # images without an object are left out of training
    assert len(val) == 290
    assert train.metainfo['classes'] == ('person', 'car', 'bicycle')
    assert tuple(train[0]['inputs'].shape) == (3, 256, 320)
    assert tuple(val[0]['inputs'].shape) == (3, 512, 640)


def test_deeppcb_keeps_its_size_for_the_pretrained_detector(deeppcb, monkeypatch):
    name = 'retinanet_od_efficientnet-lite0_deeppcb.py'
    train, val = build(name, 'DEEPPCB_ROOT', deeppcb, monkeypatch)
    assert tuple(train[0]['inputs'].shape) == (3, 320, 320)
    assert tuple(val[0]['inputs'].shape) == (3, 640, 640)
