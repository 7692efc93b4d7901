import copy
import functools
import math
import re

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper

from mmdet_odconv import FDConv2d, ODConv2d, ODResNet
from tests.conftest import ROOT
from tests.predictions import predict

# Without the plain twins of some of them.
DETECTORS = sorted((ROOT / 'configs/odconv').glob('*_[of]d_*.py'))
# What differs from others in its depth, number of kernels or data alone is left to `make slow`, and
# so is Faster R-CNN, which is in Mask R-CNN.
VARIANTS = ('_k1', '_k2', '_scratch', '-rcnn_od_r18', '-rcnn_od_mobilenetv2', 'faster-rcnn_')
VARIANTS += ('_coco128', '_hituav', '_deeppcb', 'retinanet_od_mobilenetv2_bccd')


read = functools.cache(Config.fromfile)


@pytest.fixture(autouse=True)
def _scope():
    register_all_modules()


@pytest.mark.usefixtures('_first_iteration')
@pytest.mark.parametrize(
    'path',
    [
        pytest.param(
            path,
            id=path.stem,
            marks=[pytest.mark.slow] if any(name in path.stem for name in VARIANTS) else [],
        )
        for path in DETECTORS
    ],
)
def test_a_config_builds_a_detector_that_trains_and_predicts(path):
    config = copy.deepcopy(read(path))
    if 'num_queries' in config.model:
        config.model.num_queries = 20  # there are no more positions to choose from in 64 pixels
    model = revert_sync_batchnorm(MODELS.build(config.model))  # SyncBN trains on GPUs only
    if hasattr(model, 'level_embed'):  # which DINO leaves to init_weights
        torch.nn.init.normal_(model.level_embed)
    layer = FDConv2d if '_fd_' in path.stem else ODConv2d
    kernel_nums = {m.kernel_num for m in model.backbone.modules() if isinstance(m, layer)}
    expected = int(path.stem.rpartition('_k')[2]) if '_k' in path.stem else 4
    assert kernel_nums == {64 if layer is FDConv2d else expected}
    check_rates(model, config)

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


def check_rates(model, config):
    """The attentions and the banks have rates of their own; all else is as mmdet's config says."""
    if config.optim_wrapper.get('constructor') is None:  # the small sets and FDConv: one rate
        kind = config.model.backbone.get('odconv_cfg', {}).get('type')
        assert config.optim_wrapper.optimizer.type == 'AdamW' or kind == 'FDConv2d'
        return
    sgd = config.optim_wrapper.optimizer.type == 'SGD'
    paramwise = dict(config.optim_wrapper.paramwise_cfg or {})
    assert paramwise.pop('attention_lr_mult', 1) == (0.1 if sgd else 1)
    # Banks that start from static weights are compensated for it.
    compensated = paramwise.pop('bank_lr_mult', 1) == 'compensated'
    assert compensated == bool(config.model.backbone.get('init_cfg'))
    own = rates(model, config.optim_wrapper)
    mmdets = rates(
        model, dict(config.optim_wrapper, constructor=None, paramwise_cfg=paramwise or None)
    )
    parts = set()
    for layer in model.modules():
        if isinstance(layer, ODConv2d):
            rate, decay = mmdets[layer.weight]
            for parameter in layer.attention.parameters():
                parts.add(parameter)
                assert own[parameter][0] == pytest.approx(rate * (0.1 if sgd else 1))
            factor = 1.0
            if compensated:
                attention = layer.attention
                heads = (attention.channel_fc, attention.filter_fc, attention.spatial_fc)
                # σ(2.2), the attention_bias, for each sigmoid head
                constant = (1 + math.exp(-2.2)) ** -len([h for h in heads if h is not None])
                factor = layer.kernel_num / constant**2 if sgd else math.sqrt(2) / constant
            parts.add(layer.weight)
            assert own[layer.weight] == pytest.approx((rate * factor, decay / factor))
    assert parts
    for parameter, values in own.items():
        assert parameter in parts or values == pytest.approx(mmdets[parameter])


def rates(model, optim_wrapper):
    """Rate and decay by parameter."""
    optim_wrapper = {k: v for k, v in optim_wrapper.items() if v is not None}
    return {
        parameter: (group['lr'], group['weight_decay'])
        for group in build_optim_wrapper(model, optim_wrapper).optimizer.param_groups
        for parameter in group['params']
    }


SMALL = ('coco128', 'bccd', 'deeppcb', 'hituav', 'shapes', 'own')
COCO = [p for p in DETECTORS if not p.stem.endswith(SMALL)]


@pytest.mark.parametrize('path', COCO, ids=lambda p: p.stem)
def test_a_coco_config_starts_from_the_weights_of_mmdets(path):
    backbone = read(path).model.backbone
    if path.stem.endswith('scratch'):
        assert backbone.init_cfg is None
        assert backbone.frozen_stages == -1
    elif path.stem.startswith('yolox'):
        assert 'init_cfg' not in backbone
    elif path.stem.startswith('rtmdet'):
        assert 'cspnext-tiny_imagenet' in backbone.init_cfg.checkpoint
    else:
        name = re.split('_[of]d_', path.stem)[1].split('_')[0]
        weights = {'mobilenetv2': 'open-mmlab://mmdet/mobilenet_v2'}
        if path.stem.startswith('fcos'):
            weights['r50'] = 'open-mmlab://detectron/resnet50_caffe'
        expected = weights.get(name, f'torchvision://resnet{name[1:]}')
        assert backbone.init_cfg.checkpoint == expected
        assert (backbone.frozen_stages, backbone.norm_eval) == (1, True)


def test_static_weights_start_a_backbone_by_init_cfg(tmp_path):
    """As ``torchvision://resnet18`` does, from a file."""
    from mmdet.models.backbones import ResNet

    plain = ResNet(18, base_channels=8)
    plain.eval()
    torch.save(plain.state_dict(), tmp_path / 'resnet.pth')
    config = Config.fromfile(ROOT / 'configs/odconv/retinanet_od_r18.py').model.backbone
    config.update(base_channels=8)
    config.init_cfg.checkpoint = str(tmp_path / 'resnet.pth')
    backbone = MODELS.build(config)
    backbone.init_weights()
    backbone.eval()
    x = torch.randn(2, 3, 64, 64)
    for ours, theirs in zip(backbone(x), plain(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_classifier_of_configs_pretrain_starts_a_detector(tmp_path):
    """With the options that the page of those configs names."""
    page = (ROOT / 'configs/pretrain/README.md').read_text()
    commands = ''.join(re.findall(r'```shell\n(.*?)```', page, re.DOTALL))
    options = dict(re.findall(r'model\.backbone\.(\S+?)=(\S+)', commands))
    assert set(options) == {
        'init_cfg.checkpoint', 'init_cfg.prefix', 'frozen_stages', 'odconv_cfg.norm_cfg.type'
    }  # fmt: skip
    config = Config.fromfile(ROOT / 'configs/odconv/faster-rcnn_od_r18.py')
    options['init_cfg.checkpoint'] = str(tmp_path / 'classifier.pth')
    options['frozen_stages'] = int(options['frozen_stages'])
    config.merge_from_dict({f'model.backbone.{k}': v for k, v in options.items()})

    pretrained = ODResNet(18, norm_eval=False, odconv_cfg=dict(attention_init='published'))
    pretrained.init_weights()
    weights = {f'backbone.{k}': v for k, v in pretrained.state_dict().items()}
    torch.save({'state_dict': weights}, tmp_path / 'classifier.pth')
    backbone = MODELS.build(config.model.backbone)
    backbone.init_weights()
    for name, value in backbone.state_dict().items():
        torch.testing.assert_close(value, weights[f'backbone.{name}'], msg=name)


@pytest.mark.parametrize('path', COCO, ids=lambda p: p.stem)
def test_the_base_batch_size_is_that_of_the_name(path):
    """mmdet's ``8xb2`` and so on; --auto-scale-lr scales the rate from there."""
    config = read(path)
    images = {'rtmdet': 256, 'yolox': 64}.get(path.stem.split('_')[0], 16)
    assert config.auto_scale_lr.base_batch_size == images
    assert config.train_dataloader.batch_size * 8 == images


@pytest.mark.parametrize('path', DETECTORS, ids=lambda p: p.stem)
def test_a_config_names_classes_for_all_its_outputs_and_keeps_the_best_checkpoint(path):
    config = read(path)
    heads = config.model.get('bbox_head') or config.model.roi_head.bbox_head
    classes = config.train_dataloader.dataset.get('metainfo', {}).get('classes', range(80))
    for head in heads if isinstance(heads, list) else [heads]:
        assert head.num_classes == len(classes)
    checkpoint = config.default_hooks.checkpoint
    assert 1 < checkpoint.max_keep_ckpts <= 3
    assert checkpoint.save_best == 'auto'


def test_the_file_names_follow_the_rule_of_the_readme():
    rule = re.compile(
        # detector_layer_backbone_kK_data
        r'[a-z-]+_[of]d_(r\d+|mobilenetv2|cspdarknet-tiny|cspnext-tiny|efficientnet-lite0)(_k\d+)?(_[a-z0-9]+)?\.py'
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
    assert listed == {str(p.relative_to(ROOT)) for p in DETECTORS if not p.stem.endswith(SMALL)}
    assert all(ROOT.joinpath(model['Config']).stem == model['Name'] for model in models)


@pytest.mark.parametrize(
    'variable',
    ['COCO128_ROOT', 'BCCD_ROOT', 'DEEPPCB_ROOT', 'HITUAV_ROOT', 'SHAPES_ROOT', 'OWN_ROOT'],
)
def test_data_roots_come_from_the_environment(monkeypatch, variable):
    name = variable.removesuffix('_ROOT').lower()
    path = next(p for p in DETECTORS if p.stem.endswith(name))
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
