import pytest
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper

from mmdet_odconv import ODConv2d
from tests.conftest import ROOT
from tests.predictions import predict

CONFIGS = sorted((ROOT / 'configs').glob('*/*.py'))
DETECTORS = [p for p in CONFIGS if p.parent.name != '_base_']


@pytest.fixture(autouse=True)
def _scope():
    register_all_modules()


@pytest.mark.usefixtures('_first_iteration')
@pytest.mark.parametrize('path', DETECTORS, ids=lambda p: p.stem)
def test_a_config_builds_a_detector_that_trains_and_predicts(path):
    config = Config.fromfile(path)
    if 'num_queries' in config.model:
        config.model.num_queries = 20  # there are no more positions to choose from in 64 pixels
    model = revert_sync_batchnorm(MODELS.build(config.model))  # SyncBN trains on GPUs only
    kernel_nums = {m.kernel_num for m in model.backbone.modules() if isinstance(m, ODConv2d)}
    expected = int(path.stem.rpartition('_k')[2]) if '_k' in path.stem else 4
    assert kernel_nums == {expected}

    classes = model.bbox_head.num_classes if hasattr(model, 'bbox_head') else 80
    batch = demo_mm_inputs(
        2, [[3, 64, 64], [3, 64, 48]], num_classes=classes, with_mask='mask' in path.stem
    )
    data = model.data_preprocessor(batch, training=True)
    losses, _ = model.parse_losses(model(**data, mode='loss'))
    losses.backward()
    assert losses.isfinite()
    assert all(p.grad is not None for p in model.backbone.parameters() if p.requires_grad)

    results = predict(model.eval(), batch)
    assert [hasattr(r.pred_instances, 'masks') for r in results] == ['mask' in path.stem] * 2


@pytest.mark.parametrize('path', DETECTORS, ids=lambda p: p.stem)
def test_a_config_names_classes_for_all_its_outputs(path):
    config = Config.fromfile(path)
    heads = config.model.get('bbox_head') or config.model.roi_head.bbox_head
    classes = config.train_dataloader.dataset.get('metainfo', {}).get('classes', range(80))
    for head in heads if isinstance(heads, list) else [heads]:
        assert head.num_classes == len(classes)


def test_the_file_names_follow_the_rule_of_the_readme():
    import re

    rule = re.compile(
        # detector_od_backbone_kK_data
        r'[a-z-]+_od_(r\d+|mobilenetv2|cspdarknet-tiny|cspnext-tiny)(_k\d+)?(_[a-z0-9]+)?\.py'
    )
    assert all(rule.fullmatch(p.name) for p in DETECTORS)


def test_the_metafile_lists_every_coco_config():
    import yaml

    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    models = [
        model
        for part in index['Import']
        for model in yaml.safe_load((ROOT / part).read_text())['Models']
    ]
    listed = {model['Config'] for model in models}
    small = ('coco128', 'bccd', 'shapes')
    assert listed == {str(p.relative_to(ROOT)) for p in DETECTORS if not p.stem.endswith(small)}
    assert all(ROOT.joinpath(model['Config']).stem == model['Name'] for model in models)


@pytest.mark.parametrize('variable', ['COCO128_ROOT', 'BCCD_ROOT', 'SHAPES_ROOT'])
def test_data_roots_come_from_the_environment(monkeypatch, variable):
    name = variable.removesuffix('_ROOT').lower()
    path = next(p for p in CONFIGS if p.parent.name != '_base_' and p.stem.endswith(name))
    for root in ('/somewhere/else', None):
        if root:
            monkeypatch.setenv(variable, root)
        else:
            monkeypatch.delenv(variable)
        config = Config.fromfile(path)
        expected = root or f'data/{name}'
        for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
            assert config[loader].dataset.data_root == expected
        assert config.val_evaluator.ann_file.startswith(f'{expected}/annotations/')
        assert config.test_evaluator == config.val_evaluator


@pytest.mark.parametrize('detector', ['retinanet', 'faster-rcnn', 'mask-rcnn'])
def test_with_sgd_the_attentions_learn_at_a_tenth_of_the_rate(detector):
    config = Config.fromfile(ROOT / f'configs/odconv/{detector}_od_r18.py')
    model = MODELS.build(config.model)
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    rates = {id(p): group['lr'] for group in optimizer.param_groups for p in group['params']}
    full = config.optim_wrapper.optimizer.lr
    for name, parameter in model.named_parameters():
        expected = full / 10 if '.attention.' in name else full
        assert rates[id(parameter)] == pytest.approx(expected), name
