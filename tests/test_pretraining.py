"""Pretraining a backbone as a classifier, and the detector that starts from it."""

import importlib

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope

from mmdet_odconv.backbones import GlobalAverageDropout
from tests.conftest import ROOT
from tests.test_tools.test_train_and_test import run_tool

CONFIGS = sorted((ROOT / 'configs/pretrain').glob('*.py'))
IMAGENET = [path for path in CONFIGS if path.stem.endswith('in1k')]
# Millions, as published for classifiers of 1,000 classes.
PARAMETERS = {
    'od_r18_in1k': 44.90,
    'od_r50_in1k': 90.67,
    'od_r101_k2_in1k': 90.44,
    'od_mobilenetv2_in1k': 11.51,
    'od_mobilenetv2-w0.75_in1k': 7.50,
    'od_mobilenetv2-w0.5_in1k': 4.44,
}


@pytest.fixture
def _mmpretrain():
    """mmpretrain imports torchvision, which does not load beside every build of PyTorch."""
    try:
        importlib.import_module('mmpretrain')
    except (ImportError, RuntimeError) as error:
        pytest.skip(f'mmpretrain cannot be imported: {error}')


def test_the_neck_averages_and_drops():
    x = torch.randn(4, 64, 3, 5)
    neck = GlobalAverageDropout(0.25)
    torch.testing.assert_close(neck.eval()((x,))[0], x.mean((2, 3)))
    (dropped,) = neck.train()((x,))
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (x.mean((2, 3)) / 0.75)[kept])
    # 256 averages: 64 are dropped on average, with a standard deviation of 7.
    assert 30 < (~kept).sum() < 100


@pytest.mark.usefixtures('_mmpretrain')
def test_every_published_classifier_has_a_config():
    assert {path.stem for path in IMAGENET} == set(PARAMETERS)


@pytest.mark.usefixtures('_mmpretrain')
@pytest.mark.parametrize('path', IMAGENET, ids=lambda p: p.stem)
def test_an_imagenet_config_has_the_papers_network_and_schedule(path):
    config = Config.fromfile(path)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(config.model)
        optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    parameters = sum(p.numel() for p in model.parameters())
    assert round(parameters / 1e6, 2) == PARAMETERS[path.stem]
    assert model.neck.dropout.p == 0.2

    mobile = 'mobilenetv2' in path.stem
    rate, decay, epochs = (0.05, 4e-5, 150) if mobile else (0.1, 1e-4, 100)
    assert isinstance(optimizer, torch.optim.SGD)
    assert {(g['lr'], g['weight_decay']) for g in optimizer.param_groups} == {(rate, decay)}
    assert config.train_cfg.max_epochs == epochs
    if mobile:
        assert config.param_scheduler.type == 'CosineAnnealingLR'
        assert config.param_scheduler.T_max == 150
    else:
        assert list(config.param_scheduler.milestones) == [30, 60, 90]
    (hook,) = config.custom_hooks
    assert (hook.type, hook.initial, hook.anneal_epochs) == ('ODConvTemperatureHook', 30, 10)
    assert config.train_dataloader.batch_size * 8 == config.auto_scale_lr.base_batch_size == 256


@pytest.mark.slow
@pytest.mark.usefixtures('_mmpretrain')
def test_the_road_from_a_classifier_to_a_detector(tmp_path):
    """Each step by the tools of the repository: images, pretraining, testing, detector."""
    small = ['--train', 60, '--val', 30, '--size', 64, 64]
    pictures, scenes = tmp_path / 'pictures', tmp_path / 'scenes'
    run_tool('study/make_shapes_dataset.py', pictures, '--classification', *small)
    run_tool('study/make_shapes_dataset.py', scenes, '--hard', *small)

    def loaders(*names):
        return [
            f'{name}_dataloader.{option}'
            for name in names
            for option in ('num_workers=0', 'persistent_workers=False')
        ]

    config = ROOT / 'configs/pretrain/od_r18_shapes.py'
    once = ['train_cfg.max_epochs=1', 'param_scheduler.0.end=1']
    options = [*once, *loaders('train', 'val', 'test')]
    run_tool(
        *('train.py', config, '--work-dir', tmp_path, '--cfg-options', *options),
        SHAPES_CLASSIFICATION_ROOT=str(pictures),
    )
    checkpoint = tmp_path / 'epoch_1.pth'
    tested = run_tool(
        *('test.py', config, checkpoint, '--work-dir', tmp_path, '--cfg-options', *options),
        SHAPES_CLASSIFICATION_ROOT=str(pictures),
    )
    assert 'accuracy/top1' in tested.stdout

    detector = ROOT / 'configs/pretrain/retinanet_od_r18_shapes-hard.py'
    start = f'model.backbone.init_cfg.checkpoint={checkpoint}'
    options = [*once, *loaders('train', 'val')]
    log = run_tool(
        *('train.py', detector, '--work-dir', tmp_path / 'detector', '--cfg-options'),
        *(start, *options),
        SHAPES_HARD_ROOT=str(scenes),
    ).stdout
    assert 'unexpected key' not in log
    assert 'missing key' not in log
    assert (tmp_path / 'detector/epoch_1.pth').is_file()

    config = Config.fromfile(detector)
    config.model.backbone.init_cfg.checkpoint = str(checkpoint)
    with DefaultScope.overwrite_default_scope('mmdet'):
        backbone = MODELS.build(config.model.backbone)
    backbone.init_weights()
    saved = torch.load(checkpoint)['state_dict']
    for name, value in backbone.state_dict().items():
        torch.testing.assert_close(value, saved[f'backbone.{name}'], msg=name)
