"""The dense network as an ONNX file against PyTorch."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import nn

from mmdet_odconv import use_valid_pooling
from mmdet_odconv.deployment import (
    export_dense_network,
    largest_difference,
    onnx_network,
    use_onnx_network,
)
from mmdet_odconv.deployment.dense_network import flatten, unflatten
from tests.conftest import ROOT
from tests.predictions import assert_same_predictions, predict
from tests.test_deployment.test_fuse import prepare

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')


def detector(head=None):
    register_all_modules()
    config = Config.fromfile(ROOT / 'configs/odconv/retinanet_od_r18_shapes.py').model
    config.backbone.update(base_channels=8, kernel_num=2)
    config.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
    config.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=1)
    config.bbox_head.norm_cfg.num_groups = 4
    config.test_cfg.score_thr = 0.0
    if head:
        config.bbox_head = head
    model = prepare(MODELS.build(config), torch.float32)
    with torch.no_grad():
        model.bbox_head.retina_cls.weight.mul_(100)
    return model


@pytest.fixture(scope='module')
def exported(_onnx_export, tmp_path_factory):
    torch.manual_seed(0)
    model = detector()
    path = tmp_path_factory.mktemp('onnx') / 'detector.onnx'
    export_dense_network(model, path, (64, 64))
    return model, path


@pytest.mark.slow
def test_height_width_and_batch_are_free(exported):
    model, path = exported
    sizes = ((1, 64, 64), (1, 224, 96), (3, 61, 130))
    images = [torch.randn(n, 3, h, w) for n, h, w in sizes]
    assert largest_difference(model, path, images) < 1e-5


@pytest.mark.slow
def test_exporting_leaves_the_detector(exported):
    model, path = exported
    assert any('bn' in name for name in model.state_dict())
    assert not any(path.parent.glob('*.data'))


@pytest.mark.parametrize(
    ('given', 'expected', 'difference'), [(0.0, 0.0, 0.0), (1e-3, 0.0, 1e3), (1.5, 2.0, 0.25)]
)
def test_an_output_of_zeros_differs_by_nothing_from_zeros(monkeypatch, given, expected, difference):
    network = mock.Mock(return_value=(torch.full((1, 3), expected),))
    network.eval.return_value = network
    file = SimpleNamespace(flat=lambda image: [torch.full((1, 3), given)])
    monkeypatch.setattr(onnx_network, 'DenseNetwork', lambda detector: network)
    monkeypatch.setattr(onnx_network, 'OnnxNetwork', lambda path: file)
    found = largest_difference(nn.Identity(), 'file.onnx', [torch.zeros(1, 3, 4, 4)])
    assert found == difference or found > difference > 1


@pytest.mark.slow
def test_a_difference_is_seen(exported):
    model, path = exported
    other = detector()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.backbone.layer2[0].conv1.attention.spatial_fc.bias.add_(0.1)
    assert largest_difference(other, path, [torch.randn(1, 3, 64, 64)]) > 1e-3
    with torch.no_grad():
        other.bbox_head.retina_reg.bias.fill_(float('nan'))
    assert not largest_difference(other, path, [torch.randn(1, 3, 64, 64)]) < 1


@pytest.mark.slow
def test_a_detector_predicts_with_the_file(exported):
    model, path = exported
    batch = demo_mm_inputs(2, [[3, 96, 64], [3, 64, 80]], num_classes=5)
    twin = detector()
    twin.load_state_dict(model.state_dict())
    onnx = detector()  # its own weights are others
    use_onnx_network(onnx, path)
    assert_same_predictions(predict(onnx, batch), predict(twin, batch), score_atol=1e-5)


def test_nesting_is_kept():
    a, b, c = (torch.full((1,), float(i)) for i in range(3))
    tensors = []
    structure = flatten(([a, [b]], None, c), tensors)
    assert structure == [[0, [1]], None, 2]
    assert unflatten(structure, tensors) == [[a, [b]], None, c]
    with pytest.raises(ValueError, match='tensors, not dict'):
        flatten([{}], [])


def test_an_older_torch_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr('mmdet_odconv.deployment.onnx_export.ONNX_EXPORT', False)
    with pytest.raises(RuntimeError, match=r'writing ONNX files needs torch>=2\.6'):
        export_dense_network(detector(), tmp_path / 'x.onnx', (64, 64))


def test_two_stages_are_refused(tmp_path):
    register_all_modules()
    config = Config.fromfile(ROOT / 'configs/odconv/faster-rcnn_od_r18.py').model
    config.backbone.init_cfg = None
    model = MODELS.build(config)
    with pytest.raises(ValueError, match='FasterRCNN is not a single-stage detector'):
        export_dense_network(model, tmp_path / 'x.onnx', (64, 96))


def test_valid_pooling_is_refused(tmp_path):
    """A file would average over the padding, and no image alone, as in a check, would show it."""
    model = detector()
    use_valid_pooling(model)
    with pytest.raises(ValueError, match=r"leaves out the padding .*attention_pool='all'"):
        export_dense_network(model, tmp_path / 'valid.onnx', (32, 64))
    with pytest.raises(ValueError, match=r"leaves out the padding .*attention_pool='all'"):
        use_onnx_network(model, tmp_path / 'valid.onnx')


def test_other_files_are_refused(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    path = tmp_path / 'other.onnx'
    with pytest.raises(ValueError, match=r'other\.onnx is not a file of tools/deployment/export'):
        use_onnx_network(detector(), path)
    value = helper.make_tensor_value_info('image', TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info('out', TensorProto.FLOAT, [1])
    node = helper.make_node('Relu', ['image'], ['out'])
    graph = helper.make_graph([node], 'other', [value], [out])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)]), path)
    with pytest.raises(ValueError, match=r'other\.onnx is not a file of tools/deployment/export'):
        use_onnx_network(detector(), path)
