"""Detectors from mmdet's own config files: converted, trained for a step, tested, saved, loaded."""

import copy
import importlib.util

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.hub import get_config

from mmdet_odconv import ODConv2d, convert_to_odconv
from tests.conftest import ROOT
from tests.reference import relative_error

SPEC = importlib.util.spec_from_file_location(
    'convert_zoo', ROOT / 'tools/analysis_tools/convert_zoo.py'
)
TOOL = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TOOL)

# One of each kind; the others are left to `make slow`.
QUICK = {'RetinaNet', 'FCOS', 'YOLOX', 'RTMDet', 'Faster R-CNN', 'DETR', 'MobileNetV2', 'Swin'}
FAMILIES = [
    family if family in QUICK else pytest.param(family, marks=pytest.mark.slow)
    for family in (*TOOL.DETECTORS, *TOOL.BACKBONES)
]
WITH_MASKS = ('Mask R-CNN', 'HTC', 'Swin')
RESIDUAL = ('ResNet', 'ResNeXt', 'Res2Net', 'ResNeSt', 'RegNet')
SIZES = {'SSD': 300}


def shrink(config):
    """A detector of the same modules, with fewer channels, layers, queries and proposals."""
    if config.backbone.type in ('ResNet', 'ResNeXt'):
        config.backbone.base_channels = 16
        width = config.neck.in_channels
        config.neck.in_channels = width // 4 if isinstance(width, int) else [c // 4 for c in width]
    if config.backbone.type in RESIDUAL:
        config.backbone.zero_init_residual = False  # which would let no gradient into the blocks
    if config.backbone.type in (*RESIDUAL, 'HRNet'):
        config.backbone.norm_eval = False  # whose statistics, in a new backbone, normalise nothing
    if 'num_queries' in config:
        config.num_queries = 20
        config.test_cfg.max_per_img = 20
    for part in ('encoder', 'decoder'):
        if part in config:
            config[part].num_layers = 2
    _shrink_rois(config)
    for part in config.values():
        if isinstance(part, dict):
            part.pop('init_cfg', None)  # no downloads
    return without_sync_bn(config)


def _shrink_rois(node):
    for key, value in node.items():
        if key == 'sampler' and 'num' in value:
            value.num = 16
        elif key in ('rpn_proposal', 'rpn') and 'max_per_img' in (value or {}):
            value.max_per_img = 16
        elif key == 'fc_out_channels':
            node[key] = 32
        elif key == 'num_proposals':
            node[key] = 16
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, dict):
                _shrink_rois(child)


def without_sync_bn(node):
    """SyncBN trains on GPUs only."""
    if isinstance(node, dict):
        for key, value in node.items():
            node[key] = without_sync_bn(value)
    elif isinstance(node, (list, tuple)):
        return type(node)(without_sync_bn(value) for value in node)
    return 'BN' if node == 'SyncBN' else node


def features(model, batch):
    model.eval()
    with torch.no_grad():
        return model.extract_feat(model.data_preprocessor(batch, training=False)['inputs'])


@pytest.mark.usefixtures('_first_iteration')
@pytest.mark.parametrize('family', FAMILIES)
def test_a_converted_detector_trains_predicts_saves_and_loads(family, tmp_path):
    if family == 'PAA':
        pytest.importorskip('sklearn')  # its head fits Gaussian mixtures in training
    register_all_modules()
    path = (TOOL.DETECTORS | TOOL.BACKBONES)[family]
    config = shrink(get_config(f'mmdet::{path}').model)
    odconv = dict(kernel_num=2, include=TOOL.INCLUDE.get(family, 'backbone'))
    size = SIZES.get(family, 64)
    batch = demo_mm_inputs(
        2,
        [[3, size, size]] * 2,
        num_items=[3, 2],
        with_mask=family in WITH_MASKS,
        with_semantic=family == 'HTC',
    )

    model = MODELS.build(copy.deepcopy(config))
    model.init_weights()
    static = features(model, batch)
    report = convert_to_odconv(model, **odconv)
    assert report.converted
    for before, after in zip(static, features(model, batch), strict=True):
        assert relative_error(after, before) < 1e-4

    model.train()
    data = model.data_preprocessor(batch, training=True)
    losses, _ = model.parse_losses(model(**data, mode='loss'))
    losses.backward()
    assert losses.isfinite()
    layers = [m for m in model.modules() if isinstance(m, ODConv2d)]
    gradients = [m.weight.grad for m in layers if m.weight.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)
    torch.optim.SGD(model.parameters(), lr=1e-4).step()

    if family == 'SSD':
        model.bbox_head.loss_cls = None  # mmdet 3.3.0 asks for it, and its SSD head has none
    model.eval()
    with torch.no_grad():
        data = model.data_preprocessor(batch, training=False)
        results = model(**data, mode='predict')
    assert all('pred_instances' in result for result in results)

    torch.save(model.state_dict(), tmp_path / 'detector.pth')
    config['type'], detector = 'ODConvModel', config['type']
    twin = MODELS.build(config | dict(detector=detector, odconv=odconv))
    assert type(twin) is type(model)
    twin.load_state_dict(torch.load(tmp_path / 'detector.pth'), strict=True)
    for one, other in zip(features(model, batch), features(twin, batch), strict=True):
        assert torch.equal(one, other)
