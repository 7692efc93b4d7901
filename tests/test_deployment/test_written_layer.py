"""prepare_for_export: the same outputs, in few operations and for any batch."""

import copy

import pytest
import torch
from torch import nn

from mmdet_odconv import (
    CondConv2d,
    ODConv1d,
    ODConv2d,
    ODConv3d,
    ODResNet,
    prepare_for_export,
    prepare_for_inference,
)
from mmdet_odconv.deployment.written_layer import WrittenODConv
from mmdet_odconv.layers.valid_pooling import ValidSizes
from tests.reference import randomise, relative_error
from tests.test_deployment.test_fuse import flat, prepare

LAYERS = {
    'plain': dict(),
    'one kernel': dict(kernel_num=1),
    'layer norm': dict(norm_cfg=dict(type='LN')),
    'no norm': dict(norm_cfg=None, bias=False),
    'no squeeze': dict(reduction=None),
    'pointwise': dict(kernel_size=1),
    'pointwise, one kernel': dict(kernel_size=1, kernel_num=1),
    'groups': dict(groups=2),
    'groups, one kernel': dict(groups=2, kernel_num=1),
    'pointwise groups': dict(groups=2, kernel_size=1),
    'depthwise': dict(groups=8, out_channels=8),
    'depthwise, one kernel': dict(groups=8, out_channels=8, kernel_num=1),
    'kernel alone': dict(attentions=['kernel']),
    'spatial alone': dict(attentions=['spatial'], kernel_num=1),
    'spatial and groups': dict(attentions=['spatial'], kernel_num=1, groups=2),
    'channel and groups': dict(attentions=['channel', 'kernel'], groups=2),
    'filter alone': dict(attentions=['filter'], kernel_num=1, groups=2),
    'sigmoid': dict(kernel_activation='sigmoid'),
    'stride and dilation': dict(stride=2, dilation=2, padding=2),
    'uneven': dict(padding='same', dilation=(1, 2), kernel_size=(3, 2)),
    'reflected': dict(padding_mode='reflect'),
}


def layer_with(options, kind=ODConv2d):
    options = dict(out_channels=6, kernel_size=3, padding=1, kernel_num=3) | options
    layer = nn.Sequential(kind(8, **options)).double().eval()
    randomise(layer)
    return layer


def check(layer, *batches):
    written = prepare_for_export(copy.deepcopy(layer))
    assert isinstance(written[0], WrittenODConv)
    with torch.no_grad():
        for x in batches:
            assert relative_error(written(x), layer(x)) < 1e-10
    return written


@pytest.mark.parametrize('name', LAYERS)
def test_the_outputs_are_those_of_the_layer(name):
    size = (8, 9, 7)
    check(layer_with(LAYERS[name]), *(torch.randn(b, *size).double() for b in (1, 3)))


@pytest.mark.parametrize('kind', [ODConv1d, ODConv3d])
@pytest.mark.parametrize('groups', [1, 2])
def test_other_dimensions(kind, groups):
    layer = layer_with(dict(groups=groups), kind)
    check(layer, *(torch.randn(b, 8, *(7, 6, 5)[: kind.ndim]).double() for b in (1, 2)))


def test_a_backbone_and_a_layer_at_two_places():
    model = prepare(ODResNet(depth=18, base_channels=8, kernel_num=2))
    model.layer1[1].conv2 = model.layer1[1].conv1
    x = torch.randn(2, 3, 64, 96).double()
    with torch.no_grad():
        expected = flat(model(x))
        assert prepare_for_export(model) is model
        assert max(map(relative_error, flat(model(x)), expected)) < 1e-10
    assert not any(isinstance(module, ODConv2d) for module in model.modules())
    assert model.layer1[1].conv2 is model.layer1[1].conv1


def with_two_biases():
    layer = layer_with(dict(out_channels=3))
    layer[0].bias = nn.Parameter(torch.randn(3, 3).double())
    return layer


def with_hook():
    layer = layer_with({})
    layer[0].register_forward_hook(lambda *_: None)
    return layer


def with_valid_pooling():
    layer = layer_with({})
    layer[0].valid_sizes = ValidSizes()
    return layer


@pytest.mark.parametrize(
    'make',
    [
        with_two_biases,
        with_hook,
        with_valid_pooling,
        lambda: layer_with({}).half(),
        lambda: nn.Sequential(CondConv2d(4, 6, 3)).eval(),
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3)).eval(),
    ],
)
def test_other_layers_stay(make):
    layer = make()
    kind = type(layer[0])
    assert type(prepare_for_export(layer)[0]) is kind


@pytest.mark.slow
def test_any_number_of_images():
    layer = layer_with({})
    written = check(layer, torch.randn(1, 8, 9, 7).double())
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    x = torch.randn(3, 8, 9, 7).double()
    program = torch.export.export(written, (x,), dynamic_shapes=(free,), strict=False).module()
    with torch.no_grad():
        for size in ((1, 8, 9, 7), (4, 8, 12, 20)):
            x = torch.randn(size).double()
            assert relative_error(program(x), layer(x)) < 1e-10


def test_a_trace_for_one_image_refuses_more():
    written = prepare_for_export(layer_with({}))
    traced = torch.jit.trace(written, torch.randn(1, 8, 9, 7).double())
    with pytest.raises(RuntimeError):
        traced(torch.randn(2, 8, 9, 7).double())


# A LayerNorm cannot be folded: it is one node more.
MOST_NODES = [
    (dict(kernel_num=4), 15),
    (dict(kernel_num=4, groups=8, out_channels=8), 15),
    (dict(kernel_num=4, kernel_size=1, padding=0), 14),
    (dict(kernel_num=4, norm_cfg=dict(type='LN')), 16),
    (dict(kernel_num=1), 12),
    (dict(kernel_num=1, kernel_size=1, padding=0), 11),
    (dict(kernel_num=1, norm_cfg=dict(type='LN')), 13),
]


@pytest.mark.usefixtures('_onnx_export')
@pytest.mark.parametrize(
    ('options', 'most'),
    [MOST_NODES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in MOST_NODES[1:])],
)
def test_how_many_nodes_a_layer_is_in_a_file(options, most):
    written = prepare_for_export(layer_with(options).float())
    program = torch.onnx.export(written, (torch.randn(1, 8, 9, 7),), dynamo=True, verbose=False)
    nodes = [node.op_type for node in program.model_proto.graph.node]
    assert nodes.count('Conv') == 1
    assert len(nodes) <= most, nodes


def test_a_prepared_layer_is_exported_as_well():
    layer = layer_with({})
    assert isinstance(prepare_for_export(prepare_for_inference(layer))[0], WrittenODConv)
