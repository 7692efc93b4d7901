"""Detectors up to their boxes: the same as mmdet's own, in PyTorch and as ONNX files."""

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.structures import InstanceData
from torch import nn

from mmdet_odconv.compat import ONNX_EXPORT
from mmdet_odconv.deployment import (
    Detections,
    describe_preprocessing,
    disagreement,
    export_detector,
    use_onnx_network,
)
from mmdet_odconv.deployment.onnx_export import DESCRIPTION
from mmdet_odconv.deployment.onnx_network import OnnxNetwork
from tests.conftest import ROOT
from tests.predictions import predict
from tests.test_deployment.test_fuse import prepare

pytestmark = pytest.mark.skipif(not ONNX_EXPORT, reason='the operators need torch 2.6')

CONFIGS = {
    'retinanet': 'retinanet_od_r18_shapes',
    'atss': 'atss_od_r50',
    'fcos': 'fcos_od_r50',
    'yolox': 'yolox_od_cspdarknet-tiny',
    'rtmdet': 'rtmdet_od_cspnext-tiny',
    'faster-rcnn': 'faster-rcnn_od_r18_coco128',
    'cascade-rcnn': 'cascade-rcnn_od_r50',
    'mask-rcnn': 'mask-rcnn_od_r18_coco128',
}
LAST = re.compile(r'(retina|atss|rpn|fc|rtm)_(cls|reg)|conv_(cls|reg|obj|logits)')


def small_config(family):
    """The family's config with few channels and few boxes."""
    config = Config.fromfile(ROOT / f'configs/odconv/{CONFIGS[family]}.py').model
    if family in ('yolox', 'rtmdet'):
        config.backbone.update(widen_factor=0.125, deepen_factor=0.167)
        widths = [int(width * 0.125) for width in (256, 512, 1024)]
        config.neck.update(in_channels=widths, out_channels=16, num_csp_blocks=1)
        config.bbox_head.update(in_channels=16, feat_channels=16)
    else:
        config.backbone.update(depth=18, base_channels=8, init_cfg=None, frozen_stages=-1)
        config.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
        for head in config.get('bbox_head'), config.get('rpn_head'):
            if head:
                head.update(in_channels=16, feat_channels=16)
        if 'bbox_head' in config:
            config.bbox_head.norm_cfg = dict(type='GN', num_groups=4)
    if 'odconv' in config:
        config.odconv.kernel_num = 2
    if 'roi_head' in config:
        roi = config.roi_head
        for key in ('bbox_roi_extractor', 'mask_roi_extractor'):
            if roi.get(key):
                roi[key].update(out_channels=16)
        for head in roi.bbox_head if isinstance(roi.bbox_head, list) else [roi.bbox_head]:
            head.update(in_channels=16, fc_out_channels=32, num_classes=5)
        if roi.get('mask_head'):
            roi.mask_head.update(in_channels=16, conv_out_channels=16, num_classes=5)
        config.test_cfg.rpn.update(nms_pre=60, max_per_img=40)
        config.test_cfg.rcnn.update(score_thr=0.15, max_per_img=30)
    else:
        config.bbox_head.num_classes = 5
        config.test_cfg.update(score_thr=0.01)
        if family not in ('yolox',):
            config.test_cfg.update(nms_pre=50, max_per_img=30)
    return config


def build(family):
    """A detector whose scores and boxes differ from place to place."""
    register_all_modules()
    model = prepare(MODELS.build(small_config(family)), torch.float32)
    last = [module for name, module in model.named_modules() if LAST.search(name)]
    for layer in last:
        layer.register_forward_hook(normalise)
    predict(model, batch_of(model))
    for layer in last:
        layer._forward_hooks.clear()
    if family == 'fcos':  # no distance to a side of a box is negative
        model.bbox_head.conv_reg.bias.data.add_(3)
    return model


def normalise(layer, inputs, outputs):
    """Let the outputs of a layer, at its first call, have a mean of 0 and a deviation of 1."""
    if not hasattr(layer, 'normalised'):
        layer.normalised = True
        mean, factor = outputs.mean(), 1 / outputs.std()
        layer.weight.data.mul_(factor)
        layer.bias.data.sub_(mean).mul_(factor)
        return (outputs - mean) * factor


def batch_of(model, sizes=((3, 96, 64), (3, 64, 96)), scale=(0.5, 0.8)):
    """Images of several sizes, padded to one, with what the data pipeline says of them."""
    batch = demo_mm_inputs(len(sizes), [list(size) for size in sizes], num_classes=5)
    for sample in batch['data_samples']:
        height, width = sample.img_shape[:2]
        original = round(height / scale[1]), round(width / scale[0])
        sample.set_metainfo(dict(scale_factor=scale, ori_shape=original))
    return batch


def inputs_of(model, batch):
    """What :class:`Detections` takes of a batch."""
    data = model.data_preprocessor(copy.deepcopy(batch), training=False)
    size = torch.tensor([sample.img_shape[:2] for sample in data['data_samples']])
    scale = torch.tensor([sample.scale_factor for sample in data['data_samples']])
    return data['inputs'], size.float(), scale


def assert_same_detections(outputs, samples, tolerance=1e-3):
    """Fail unless an image's detections are those of mmdet, and there are some."""
    for i, sample in enumerate(samples):
        expected = sample.pred_instances
        boxes, scores, labels = (torch.as_tensor(output[i]) for output in outputs[:3])
        there = labels >= 0
        assert there.sum() == len(expected) > 0
        assert not scores[~there].any()
        assert not boxes[~there].any()
        # Nearly equal scores may stand in another order.
        for box, score, label in zip(
            expected.bboxes, expected.scores, expected.labels, strict=True
        ):
            far = (boxes[there] - box).abs().amax(1) / box.abs().max().clamp(min=1)
            same = (far < tolerance) & (labels[there] == label)
            assert (same & ((scores[there] - score).abs() < tolerance)).any(), (box, score, label)


@pytest.mark.parametrize('family', CONFIGS)
def test_the_boxes_are_those_of_mmdet(family):
    model = build(family)
    batch = batch_of(model)
    expected = predict(copy.deepcopy(model), copy.deepcopy(batch))
    with torch.no_grad():
        outputs = Detections(model)(*inputs_of(model, batch))
    assert_same_detections(outputs, expected)
    assert len(outputs) == 3 + (family == 'mask-rcnn')


def test_exporting_leaves_the_detector():
    model = build('retinanet')
    names = set(model.state_dict())
    Detections(model)
    assert set(model.state_dict()) == names


class Suppress(nn.Module):
    def forward(self, boxes, scores):
        return torch.ops.mmdet_odconv.suppress(boxes, scores, 0.5, 6)


class RoiFeatures(nn.Module):
    def forward(self, fine, coarse, rois, images, levels):
        return torch.ops.mmdet_odconv.roi_features(
            [fine, coarse], rois, images, levels, [4, 8], 3, 2, 0
        )


def in_onnx_runtime(module, inputs, path):
    import onnxruntime

    from mmdet_odconv.deployment.onnx_operators import TRANSLATIONS

    names = [f'input{i}' for i in range(len(inputs))]
    torch.onnx.export(
        module.eval(),
        tuple(inputs),
        str(path),
        dynamo=True,
        input_names=names,
        custom_translation_table=TRANSLATIONS,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    arrays = [value.numpy() for value in inputs]
    return torch.from_numpy(session.run(None, dict(zip(names, arrays, strict=True)))[0])


def overlap(a, b):
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    inside = max(width, 0) * max(height, 0)
    area = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b))
    return inside / (area - inside)


def slowly_suppressed(boxes, scores, threshold, most):
    """Greedy suppression, one box after another."""
    kept = [[-1.0] * len(row) for row in scores]
    for image, row in enumerate(scores):
        chosen = []
        for i in sorted(range(len(row)), key=lambda i: -row[i]):
            near = any(overlap(boxes[image][i], boxes[image][j]) > threshold for j in chosen)
            if row[i] > 0 and not near and len(chosen) < most:
                chosen.append(i)
                kept[image][i] = row[i]
    return torch.tensor(kept)


@pytest.fixture
def some_boxes():
    corner = torch.rand(2, 30, 2) * 20
    boxes = torch.cat([corner, corner + 5 + 10 * torch.rand(2, 30, 2)], 2)
    scores = torch.rand(2, 30)
    scores[:, ::5] = -1
    return boxes, scores


def test_suppression(some_boxes):
    expected = slowly_suppressed(*(part.tolist() for part in some_boxes), 0.5, 6)
    torch.testing.assert_close(Suppress()(*some_boxes), expected)


@pytest.mark.usefixtures('_onnx_export')
def test_suppression_as_onnx(some_boxes, tmp_path):
    expected = Suppress()(*some_boxes)
    torch.testing.assert_close(
        in_onnx_runtime(Suppress(), some_boxes, tmp_path / 'a.onnx'), expected
    )


@pytest.mark.parametrize('emptied', [None, 0, 1])
@pytest.mark.usefixtures('_onnx_export')
def test_roi_features_as_onnx(tmp_path, emptied):
    corner = torch.rand(7, 2) * 20
    levels = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    if emptied is not None:
        levels = torch.full_like(levels, 1 - emptied)
    inputs = (
        torch.randn(2, 3, 8, 9),
        torch.randn(2, 3, 4, 5),
        torch.cat([corner, corner + 12 * torch.rand(7, 2)], 1),
        torch.tensor([0, 1, 0, 1, 1, 0, 1]),
        levels,
    )
    expected = RoiFeatures()(*inputs)
    for i in range(7):  # each by itself, on its own level
        one = [inputs[0], inputs[1], *(part[i : i + 1] for part in inputs[2:])]
        torch.testing.assert_close(RoiFeatures()(*one)[0], expected[i])
    actual = in_onnx_runtime(RoiFeatures(), inputs, tmp_path / 'a.onnx')
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda m: m.bbox_head.test_cfg.update(nms=ConfigDict(type='soft_nms')), 'by soft_nms'),
        (lambda m: setattr(type(m.bbox_head), '_bbox_post_process', print), 'way of its own'),
    ],
)
def test_what_cannot_be_written_is_said(change, message):
    model = build('retinanet')
    model.bbox_head.__class__ = type('OwnHead', (type(model.bbox_head),), {})
    change(model)
    with pytest.raises(ValueError, match=message):
        Detections(model)


def test_a_transformer_is_refused():
    register_all_modules()
    config = Config.fromfile(ROOT / 'configs/odconv/dino_od_r50.py').model
    config.backbone.init_cfg = None
    config.backbone.depth, config.neck.in_channels = 18, [128, 256, 512]
    with pytest.raises(ValueError, match='DINO is neither a single-stage detector with a dense'):
        Detections(MODELS.build(config))


def test_the_description_of_the_preprocessing():
    model = build('yolox')
    model.cfg = Config.fromfile(ROOT / 'configs/odconv/yolox_od_cspdarknet-tiny.py')
    about = json.loads(json.dumps(describe_preprocessing(model)))
    assert about['resize'] == dict(scale=[416, 416], keep_ratio=True)
    assert about['pad'] == dict(size=None, divisor=None, square=True, value=[114.0] * 3)
    assert about['mean'] == [0.0] * 3
    assert not about['bgr_to_rgb']
    assert about['size_divisor'] == 32
    model.cfg.test_dataloader.dataset.pipeline[1] = dict(type='RandomCrop', crop_size=(8, 8))
    with pytest.raises(ValueError, match=r'RandomCrop.*a step that the file cannot describe'):
        describe_preprocessing(model)


SEVERAL = [
    'retinanet-2', 'retinanet-free', 'atss-2', 'fcos-free', 'yolox-2', 'rtmdet-free',
    'faster-rcnn-2', 'cascade-rcnn-free', 'mask-rcnn-2',
]  # fmt: skip


@pytest.fixture(scope='module', params=[*CONFIGS, *SEVERAL])
def exported(request, _onnx_export, tmp_path_factory):
    """A file of each family for one image, and some for more."""
    torch.manual_seed(0)
    family, _, batch = request.param.rpartition('-')
    if batch not in ('2', 'free'):
        family, batch = request.param, '1'
    model = build(family)
    path = tmp_path_factory.mktemp('onnx') / 'detector.onnx'
    # What is free makes the export slow: one family stands for the others.
    free = family == 'retinanet'
    export_detector(model, path, (96, 128), None if batch == 'free' else int(batch), free)
    return model, path, free, batch


@pytest.mark.slow
def test_a_detector_predicts_with_the_file(exported):
    model, path, free, _ = exported
    sizes = ((3, 96, 64), (3, 64, 96)) if free else ((3, 96, 128), (3, 90, 120), (3, 96, 100))
    inputs = batch_of(model, sizes)
    expected = predict(copy.deepcopy(model), copy.deepcopy(inputs))
    twin = build('retinanet' if free else model_family(model))  # its own weights are others
    use_onnx_network(twin, path)
    actual = predict(twin, inputs)
    for sample, other in zip(actual, expected, strict=True):
        found = sample.pred_instances
        outputs = [found.bboxes[None], found.scores[None], found.labels[None]]
        assert_same_detections(outputs, [other])
        if 'masks' in other.pred_instances:
            assert found.masks.shape == other.pred_instances.masks.shape
            assert (found.masks.sum() - other.pred_instances.masks.sum()).abs() < 50
    alone, number = disagreement(model, path, [torch.randn(3, 3, 96, 128)])
    assert alone < 0.05 * number


def model_family(model):
    kinds = dict(
        ATSS='atss', FCOS='fcos', YOLOX='yolox', RTMDet='rtmdet', FasterRCNN='faster-rcnn',
        CascadeRCNN='cascade-rcnn', MaskRCNN='mask-rcnn',
    )  # fmt: skip
    return kinds[type(model).__name__]


@pytest.mark.slow
def test_each_image_of_a_batch_gets_what_it_gets_alone(exported):
    """Images of several sizes, padded to one."""
    model, path, _, batch = exported
    if batch == '1':
        pytest.skip('a file for one image')
    sizes = ((3, 96, 128), (3, 90, 120), (3, 96, 100), (3, 64, 128))[: 2 if batch == '2' else 4]
    inputs = inputs_of(model, batch_of(model, sizes))
    outputs = OnnxNetwork(path).flat(*inputs)
    network = Detections(model)
    for i in range(len(sizes)):
        alone = [part[i : i + 1] for part in inputs]
        with torch.no_grad():
            boxes, scores, labels, *masks = network(*alone)
        found = labels[0] >= 0
        sample = InstanceData(bboxes=boxes[0][found], scores=scores[0][found])
        sample.labels = labels[0][found]
        assert_same_detections(
            [output[i : i + 1] for output in outputs], [SimpleNamespace(pred_instances=sample)]
        )
        for mask in masks:
            assert abs(outputs[3][i][found].mean() - mask[0][found].mean()) < 1e-3


@pytest.mark.slow
def test_the_file_says_what_a_caller_needs(exported):
    import onnx

    _, path, _, batch = exported
    model = onnx.load(path)
    about = json.loads({entry.key: entry.value for entry in model.metadata_props}[DESCRIPTION])
    assert about['outputs'][:3] == ['boxes', 'scores', 'labels']
    assert [given.name for given in model.graph.input] == ['image', 'size', 'scale']
    assert not any(path.parent.glob('*.data'))
    assert about['batch'] == (None if batch == 'free' else int(batch))
