"""The small real data sets: skipped, with the reason, where they are absent."""

import os
import subprocess
import sys

import pytest
from mmdet.registry import DATASETS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from tests.conftest import ROOT

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


def build(config_name, variable, root, monkeypatch):
    register_all_modules()
    monkeypatch.setenv(variable, str(root))
    config = Config.fromfile(ROOT / 'configs/odconv' / config_name)
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
