"""Every rule of the conversion, on small models."""

import copy
import pickle
import warnings
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks.wrappers import Conv2d as WrappedConv2d
from mmcv.cnn.bricks.wrappers import Conv3d as WrappedConv3d
from mmdet.models.backbones import (
    SSDVGG,
    CSPDarknet,
    CSPNeXt,
    Darknet,
    HRNet,
    MobileNetV2,
    PyramidVisionTransformer,
    ResNeSt,
    ResNet,
    ResNetV1d,
    SwinTransformer,
)
from mmdet.models.dense_heads import RetinaHead, RPNHead, RTMDetSepBNHead, TOODHead, YOLOXHead
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from mmdet_odconv import ODConv1d, ODConv2d, ODConv3d, convert_to_odconv
from mmdet_odconv.conversion import ConversionError
from tests.reference import relative_error


class Net(nn.Module):
    """A model with whatever backbone, and a head if need be."""

    def __init__(self, backbone, head=None):
        super().__init__()
        self.backbone = backbone
        if head is not None:
            self.bbox_head = head

    def forward(self, x):
        return self.backbone(x)


def chain(*modules):
    return Net(nn.Sequential(*modules))


def reason(report, name):
    return dict(report.kept).get(name)


def odconvs(model):
    return {name for name, m in model.named_modules() if isinstance(m, ODConv2d)}


@pytest.mark.parametrize(
    ('plain', 'odconv', 'size'),
    [
        (nn.Conv1d, ODConv1d, (9,)),
        (nn.Conv2d, ODConv2d, (9, 8)),
        (nn.Conv3d, ODConv3d, (5, 6, 4)),
        (WrappedConv2d, ODConv2d, (9, 8)),
        (WrappedConv3d, ODConv3d, (5, 6, 4)),
    ],
)
@pytest.mark.parametrize('kernel_num', [1, 3])
def test_plain_convolutions_of_every_kind_keep_their_function(plain, odconv, size, kernel_num):
    conv = plain(4, 6, 3, stride=2, padding=1, dilation=1, groups=2)
    model = chain(conv, nn.ReLU()).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    before = model(x)
    report = convert_to_odconv(model, kernel_num=kernel_num)
    assert report.converted == ['backbone.0']
    assert report.kept == []
    assert type(model.backbone[0]) is odconv
    assert model.backbone[0].kernel_num == kernel_num
    assert relative_error(model(x), before) < 1e-10


def test_the_kernels_of_a_bank_differ():
    model = chain(nn.Conv2d(4, 6, 3))
    convert_to_odconv(model)
    bank = model.backbone[0].weight
    assert (bank[0] - bank[1]).abs().min() > 0


def test_the_arguments_of_odconv_arrive():
    model = chain(nn.Conv2d(32, 6, 3))
    convert_to_odconv(
        model,
        kernel_num=3,
        reduction=0.5,
        min_attention_channels=8,
        norm_cfg=dict(type='LN'),
        temperature=4.0,
    )
    layer = model.backbone[0]
    assert (layer.kernel_num, layer.temperature) == (3, 4.0)
    assert layer.attention.fc.weight.shape[:2] == (16, 32)
    assert isinstance(layer.attention.bn, nn.LayerNorm)


def test_no_reduction_means_no_squeeze_as_in_the_layer():
    model = chain(nn.Conv2d(32, 6, 3))
    convert_to_odconv(model, reduction=None)
    assert model.backbone[0].attention.fc is None
    assert model.backbone[0].attention.channel_fc.weight.shape[:2] == (32, 32)


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        (dict(kernel_num=0), 'kernel_num must be at least 1, got 0'),
        (dict(reductoin=1), "no argument 'reductoin'; is it 'reduction'"),
        (dict(stride=2), "no argument 'stride'; known are attention_bias, .*, temperature"),
    ],
)
def test_a_bad_argument_leaves_the_model_as_it_was(argument, message):
    model = chain(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3))
    with pytest.raises(ValueError, match=message):
        convert_to_odconv(model, **argument)
    assert not odconvs(model)


def test_a_module_at_several_places_stays_one():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = Net(nn.ModuleDict({'a': conv, 'b': nn.Sequential(conv, nn.ReLU(), conv)}))
    report = convert_to_odconv(model)
    assert report.converted == ['backbone.a']
    layer = model.backbone['a']
    assert isinstance(layer, ODConv2d)
    assert layer is model.backbone['b'][0]
    assert layer is model.backbone['b'][2]


def test_the_convolutions_that_rtmdet_shares_over_its_levels_stay_shared():
    head = RTMDetSepBNHead(3, 8, feat_channels=8, share_conv=True, norm_cfg=dict(type='BN'))
    model = Net(nn.Sequential(nn.Conv2d(4, 4, 1)), head)
    report = convert_to_odconv(model, include='bbox_head')
    assert len(report.converted) == 2 * 4  # of the 2 * 4 * 5 places
    for convs in (head.cls_convs, head.reg_convs):
        for i in range(4):
            layers = {level[i].conv for level in convs}
            assert len(layers) == 1
            assert isinstance(layers.pop(), ODConv2d)
    assert {m.norm for m in head.cls_convs[0]}.isdisjoint(m.norm for m in head.cls_convs[1])


def test_a_place_that_is_excluded_counts_for_all_places_of_a_module():
    conv = nn.Conv2d(4, 4, 1)
    model = Net(nn.ModuleDict({'a': conv, 'b': nn.Sequential(conv), 'c': nn.Conv2d(4, 4, 1)}))
    report = convert_to_odconv(model, exclude=r'\.b\.')
    assert report.converted == ['backbone.c']
    assert reason(report, 'backbone.a') == 'excluded'


def test_forward_and_backward_hooks_survive_and_can_be_removed():
    model = chain(nn.Conv2d(4, 6, 3))
    calls = []
    conv = model.backbone[0]
    handles = [
        conv.register_forward_pre_hook(lambda m, args: calls.append('pre')),
        conv.register_forward_hook(
            lambda m, args, kwargs, out: calls.append('post'), with_kwargs=True
        ),
        conv.register_forward_hook(lambda m, args, out: calls.append('always'), always_call=True),
        conv.register_full_backward_hook(lambda m, gi, go: calls.append('backward')),
    ]
    convert_to_odconv(model)
    model(torch.randn(2, 4, 5, 5, requires_grad=True)).sum().backward()
    assert calls == ['pre', 'post', 'always', 'backward']
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 4, 5, 5))
    assert len(calls) == 4


def test_the_old_convolution_is_released():
    model = chain(nn.Conv2d(4, 6, 3))
    old = weakref.ref(model.backbone[0])
    convert_to_odconv(model)
    assert old() is None


def test_training_mode_device_and_type_survive():
    model = chain(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3)).to(torch.bfloat16)
    model.backbone[0].eval()
    convert_to_odconv(model)
    first, second = model.backbone
    assert not any(m.training for m in first.modules())
    assert all(m.training for m in second.modules())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    model = chain(nn.Conv2d(4, 6, 3)).to('meta')
    convert_to_odconv(model)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_what_is_frozen_in_a_backbone_that_trains_stays_plain():
    model = chain(*(nn.Conv2d(4, 4, 3) for _ in range(3)))
    model.backbone[0].requires_grad_(False)
    model.backbone[1].bias.requires_grad_(False)
    report = convert_to_odconv(model)
    frozen, half, free = model.backbone
    assert type(frozen) is nn.Conv2d
    assert reason(report, 'backbone.0') == 'frozen'
    assert half.weight.requires_grad
    assert not half.bias.requires_grad
    assert all(p.requires_grad for p in free.parameters())


def test_a_frozen_model_is_converted_and_stays_frozen_the_attention_included():
    model = chain(nn.Conv2d(4, 4, 3)).requires_grad_(False)
    assert convert_to_odconv(model).converted == ['backbone.0']
    assert not any(p.requires_grad for p in model.parameters())


def test_a_frozen_teacher_has_the_layers_of_its_student():
    student = chain(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    student.backbone[0].requires_grad_(False)
    teacher = copy.deepcopy(student).requires_grad_(False)
    model = nn.ModuleDict(dict(student=student, teacher=teacher))
    convert_to_odconv(model)
    assert odconvs(student) == odconvs(teacher) == {'backbone.1'}


def test_frozen_stages_and_norm_eval_of_a_resnet():
    model = Net(ResNet(18, base_channels=8, frozen_stages=2, norm_eval=True))
    convert_to_odconv(model)
    model.train()
    backbone = model.backbone
    assert not any(p.requires_grad for p in backbone.layer2.parameters())
    assert not odconvs(backbone.layer2)
    assert all(p.requires_grad for p in backbone.layer3.parameters())
    assert not backbone.layer4[0].conv1.attention.bn.training
    sum(out.sum() for out in model(torch.randn(2, 3, 32, 32))).backward()
    assert backbone.layer3[0].conv1.weight.grad.any()


def test_each_layer_and_each_seed_has_noise_of_its_own():
    plain = chain(*(nn.Conv2d(8, 8, 3) for _ in range(3)))
    runs = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(plain)
        torch.manual_seed(seed)
        convert_to_odconv(model)
        runs.append([(conv.weight - conv.weight.mean(0)).flatten() for conv in model.backbone])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    every = torch.stack([*runs[0], *runs[2]])
    cosines = F.normalize(every) @ F.normalize(every).T
    assert (cosines - torch.eye(6)).abs().max() < 0.1


def test_the_attributes_of_a_conv_module_survive():
    module = ConvModule(4, 6, 3, stride=2, norm_cfg=dict(type='BN'), padding_mode='reflect')
    before = {k: v for k, v in vars(module).items() if k != '_modules'}
    convert_to_odconv(Net(nn.Sequential(module)))
    after = {k: v for k, v in vars(module).items() if k != '_modules'}
    assert isinstance(module.conv, ODConv2d)
    assert before == after


class OwnConv(nn.Conv2d):
    """Does something of its own."""


def test_what_cannot_be_converted_stays_with_the_reason():
    tied, other = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    other.weight = tied.weight
    head = TOODHead(3, 8, stacked_convs=2, feat_channels=8, norm_cfg=None, num_dcn=1)
    efficient = ConvModule(4, 4, 3, norm_cfg=dict(type='BN'), efficient_conv_bn_eval=True)
    model = Net(
        nn.ModuleDict(
            {
                'own': OwnConv(4, 4, 3),
                'transposed': nn.ConvTranspose2d(4, 4, 3),
                'spectral': spectral_norm(nn.Conv2d(4, 4, 3)),
                'weight_norm': parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
                'tied': tied,
                'other': other,
                'efficient': efficient,
                'ready': ODConv2d(4, 4, 3),
                'plain': nn.Conv2d(4, 4, 3),
            }
        ),
        head,
    )
    report = convert_to_odconv(model, include=['backbone', 'bbox_head'])
    norm = 'spectral norm, weight norm or another form of its weight'
    expected = {
        'own': 'OwnConv, a subclass with behaviour of its own',
        'transposed': 'transposed convolution',
        'spectral': norm,
        'weight_norm': norm,
        'tied': 'weight shared with another module',
        'other': 'weight shared with another module',
        'efficient.conv': 'weight read by its parent',
        'ready': 'ODConv2d already',
    }
    for name, why in expected.items():
        assert reason(report, f'backbone.{name}') == why
    assert 'backbone.plain' in report.converted
    assert {name for name, why in report.kept if why == 'deformable convolution'} == {
        'bbox_head.inter_convs.0.conv',
        'bbox_head.inter_convs.0.conv.conv_offset',
    }
    assert reason(report, 'bbox_head.cls_decomp.reduction_conv.conv') == 'weight read by its parent'
    assert reason(report, 'bbox_head.cls_decomp.layer_attention.0') == 'channel attention'


class Calls(nn.Module):
    """Has two convolutions, and calls the second past its place."""

    def __init__(self, keep):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.kept = keep(self.second)

    def forward(self, x):
        return called(self.kept, self.first(x))


def called(kept, x):
    while not callable(kept):
        kept = vars(kept)['conv'] if hasattr(kept, 'conv') else next(iter(values(kept)))
    return kept(x)


def values(kept):
    return kept.values() if isinstance(kept, dict) else kept


class Unregistered(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize(
    'keep',
    [
        lambda conv: [conv],
        lambda conv: ((conv,),),
        lambda conv: {'a': [conv]},
        lambda conv: SimpleNamespace(conv=conv),
        lambda conv: [Unregistered(conv)],
        lambda conv: conv.forward,
        lambda conv: partial(F.conv2d, weight=conv.weight, bias=conv.bias),
        lambda conv: partial(nn.Conv2d.forward, conv),
        lambda conv: lambda x: conv(x),
        lambda conv: lambda x, conv=conv: conv(x),
    ],
    ids=[
        'list',
        'tuple',
        'dict',
        'object',
        'module',
        'method',
        'weight',
        'partial',
        'cell',
        'default',
    ],
)
def test_what_is_called_past_its_place_stays(keep):
    model = Net(Calls(keep))
    report = convert_to_odconv(model)
    assert report.converted == ['backbone.first']
    assert reason(report, 'backbone.second') == 'also in a list, dict or function of the model'
    model(torch.randn(2, 4, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in model.backbone.parameters())


def test_a_hook_on_a_weight_and_a_forward_pass_of_its_own_stay():
    hooked, late, own, plain = (nn.Conv2d(4, 4, 1) for _ in range(4))
    hooked.weight.register_hook(lambda grad: 2 * grad)
    late.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    own.forward = lambda x: F.conv2d(x, own.weight.abs(), own.bias)
    report = convert_to_odconv(chain(hooked, late, own, plain))
    assert report.kept == [
        ('backbone.0', 'hook on its weight or bias'),
        ('backbone.1', 'hook on its weight or bias'),
        ('backbone.2', 'forward pass of its own'),
    ]


class MergedBranches(nn.Module):
    """A block that is trained with two branches and deployed as one convolution."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.wide(x) + self.narrow(x)

    def switch_to_deploy(self):
        self.wide.weight.data += F.pad(self.narrow.weight.data, (1, 1, 1, 1))


class Backbone(nn.Module):
    """Has a convolution of its own, and a method that calls those of its blocks."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.conv = nn.Conv2d(3, 4, 3), MergedBranches(), nn.Conv2d(4, 4, 3)

    def switch_to_deploy(self):
        self.block.switch_to_deploy()


def test_blocks_that_merge_their_branches_for_deployment_keep_them():
    model = Net(Backbone())
    report = convert_to_odconv(model)
    assert report.converted == ['backbone.conv']
    for name in ('wide', 'narrow'):
        assert reason(report, f'backbone.block.{name}') == 'weight read by its parent'
    model.backbone.switch_to_deploy()


@pytest.mark.parametrize(
    'methods', [['fuse_convs'], ['fuse_repvgg_block'], ['fuse', 'forward_fuse']]
)
def test_merging_blocks_of_other_libraries_keep_their_branches(methods):
    block = type('Block', (nn.Sequential,), dict.fromkeys(methods, nn.Sequential.forward))
    whole = type('Whole', (nn.Sequential,), {'fuse': nn.Sequential.forward})
    model = whole(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), block(nn.Conv2d(4, 4, 3)))
    report = convert_to_odconv(model, include='.*')
    assert report.converted == ['1']
    assert reason(report, '2.0') == 'weight read by its parent'


def test_the_fast_evaluation_of_conv_module_cannot_be_used_in_silence():
    conv_cfg = dict(type='ODConv')
    module = ConvModule(
        4, 6, 3, conv_cfg=conv_cfg, norm_cfg=dict(type='BN'), efficient_conv_bn_eval=True
    )
    x = torch.randn(2, 4, 8, 8)
    module.train()(x)
    module.eval()
    with pytest.raises((AttributeError, RuntimeError)):
        module(x)


def test_the_runners_fast_evaluation_leaves_odconv_as_it_is():
    model = chain(ODConv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model.train()(torch.randn(4, 3, 16, 16))
    x = torch.randn(2, 3, 16, 16)
    expected = model.eval()(x)
    turn_on_efficient_conv_bn_eval(model, 'backbone')
    assert 'forward' in vars(model.backbone)  # MMEngine replaced it
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize('layer', ['CondConv2d', 'DyConv2d', 'ODConv2d'])
def test_other_layers_can_take_the_places(layer):
    model = chain(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3))
    x = torch.randn(2, 4, 9, 9)
    expected = model.backbone(x)
    report = convert_to_odconv(model, kernel_num=3, layer=layer)
    assert [type(m).__name__ for m in model.backbone] == [layer] * 2
    assert {m.kernel_num for m in model.backbone} == {3}
    torch.testing.assert_close(model.backbone(x), expected)
    assert report.converted == ['backbone.0', 'backbone.1']


def test_layers_of_other_dimensions_stay():
    model = chain(nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3))
    report = convert_to_odconv(model, layer='DyConv2d')
    assert report.converted == ['backbone.1']
    assert reason(report, 'backbone.0') == 'DyConv2d has no such number of dimensions'


def test_unknown_layer():
    with pytest.raises(ConversionError, match=r"must be a dynamic convolution, .*got 'Conv2d'"):
        convert_to_odconv(Net(nn.Conv2d(4, 4, 3)), layer='Conv2d')


def test_a_model_that_is_a_convolution_cannot_be_replaced_in_place():
    report = convert_to_odconv(nn.Conv2d(4, 4, 3), include='')
    assert report.kept == [('', 'the model itself')]


STEMS = {
    'ResNet': (lambda: ResNet(18, base_channels=8), {'conv1'}),
    'ResNetV1d': (lambda: ResNetV1d(depth=18, stem_channels=8), {'stem.0', 'stem.3', 'stem.6'}),
    'MobileNetV2': (lambda: MobileNetV2(0.25), {'conv1.conv'}),
    'Darknet': (lambda: Darknet(), {'conv1.conv'}),
    'CSPDarknet': (lambda: CSPDarknet(widen_factor=0.125), {'stem.conv.conv'}),
    'CSPNeXt': (lambda: CSPNeXt(widen_factor=0.125), {f'stem.{i}.conv' for i in range(3)}),
    'SSDVGG': (lambda: SSDVGG(11, ceil_mode=True), {'features.0'}),
    'HRNet': (
        lambda: HRNet(
            dict(
                stage1=dict(
                    num_modules=1,
                    num_branches=1,
                    block='BOTTLENECK',
                    num_blocks=(1,),
                    num_channels=(8,),
                ),
                **{
                    f'stage{n}': dict(
                        num_modules=1,
                        num_branches=n,
                        block='BASIC',
                        num_blocks=(1,) * n,
                        num_channels=(4,) * n,
                    )
                    for n in (2, 3, 4)
                },
            )
        ),
        {'conv1', 'conv2'},
    ),
}


@pytest.mark.parametrize('name', STEMS)
@pytest.mark.parametrize('alone', [False, True])
def test_the_stem_stays_unless_asked_for(name, alone):
    build, expected = STEMS[name]
    backbone = build()
    model, prefix = (backbone, '') if alone else (Net(backbone), 'backbone.')
    names = {f'{prefix}{part}' for part in expected}
    report = convert_to_odconv(model, include='.*' if alone else 'backbone', kernel_num=1)
    assert {n for n, why in report.kept if why == 'stem'} == names
    assert report.converted
    pattern = f'^{prefix}({"|".join(expected)})$'
    assert set(convert_to_odconv(model, include=pattern).converted) == names


def test_a_backbone_without_stages_has_only_what_reads_the_image_for_a_stem():
    report = convert_to_odconv(chain(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 8, 3)))
    assert report.converted == ['backbone.1', 'backbone.2']


def test_shortcuts_stay_unless_asked_for():
    model = Net(ResNet(50, base_channels=8))
    shortcuts = {f'backbone.layer{i}.0.downsample.0' for i in range(1, 5)}
    report = convert_to_odconv(model, kernel_num=1, include=['backbone', 'layer1'])
    assert {n for n, why in report.kept if why == '1×1 shortcut'} == shortcuts
    assert set(convert_to_odconv(model, include='downsample').converted) == shortcuts


def test_the_squeezed_part_of_an_attention_stays():
    report = convert_to_odconv(Net(CSPNeXt(widen_factor=0.125)), kernel_num=1)
    assert reason(report, 'backbone.stage1.1.attention.fc') == 'channel attention'
    report = convert_to_odconv(Net(ResNeSt(depth=50, base_channels=8)), kernel_num=1)
    assert reason(report, 'backbone.layer1.0.conv2.fc1') == 'channel attention'
    assert 'backbone.layer1.0.conv2.conv' in report.converted


@pytest.mark.parametrize(
    'build',
    [
        lambda: SwinTransformer(embed_dims=24, depths=(1, 1, 1, 1), window_size=2),
        lambda: PyramidVisionTransformer(embed_dims=8, num_layers=[1, 1, 1, 1]),
    ],
)
def test_patch_embeddings_stay_unless_asked_for(build):
    model = Net(build())
    report = convert_to_odconv(model, kernel_num=1)
    embeddings = [n for n, why in report.kept if why == 'patch embedding']
    assert embeddings
    assert not any('projection' in name for name in report.converted)
    assert convert_to_odconv(model, include='projection').converted == embeddings


def test_prediction_layers_stay_unless_asked_for():
    backbone = nn.Sequential(nn.Conv2d(4, 4, 1))
    model = Net(backbone, RetinaHead(3, 8, feat_channels=8, stacked_convs=1))
    report = convert_to_odconv(model, include='bbox_head')
    assert [n for n, why in report.kept if why == 'prediction layer'] == [
        'bbox_head.retina_cls',
        'bbox_head.retina_reg',
    ]
    assert report.converted == ['bbox_head.cls_convs.0.conv', 'bbox_head.reg_convs.0.conv']
    assert reason(report, 'backbone.0') == 'not included'
    report = convert_to_odconv(model, include='retina_cls')
    assert report.converted == ['bbox_head.retina_cls']

    report = convert_to_odconv(Net(backbone, RPNHead(8, feat_channels=8)), include='bbox_head')
    assert report.converted == ['bbox_head.rpn_conv']


def test_min_channels():
    model = chain(nn.Conv2d(4, 16, 1), nn.Conv2d(16, 8, 1), nn.Conv2d(16, 16, 1))
    report = convert_to_odconv(model, min_channels=8)
    assert report.converted == ['backbone.1', 'backbone.2']
    assert reason(report, 'backbone.0') == 'fewer than 8 channels'


@pytest.mark.parametrize('argument', ['include', 'exclude'])
@pytest.mark.parametrize(
    ('pattern', 'message'),
    [
        ('bakbone', r"'bakbone' matches .* no convolution .*near names: backbone"),
        ('backbone.layer5.0', r'near names: .*backbone\.layer4\.0'),
        ('zzz', 'the model consists of: backbone'),
        ('(', r"'\(' is not a regular expression"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(argument, pattern, message):
    model = Net(ResNet(18, base_channels=8))
    with pytest.raises(ValueError, match=f'{argument} .*{message}'):
        convert_to_odconv(model, **{argument: ['layer1', pattern]})
    assert not odconvs(model)


def test_a_pattern_of_another_type_is_an_error():
    with pytest.raises(ValueError, match='include None is not a regular expression'):
        convert_to_odconv(Net(nn.Conv2d(4, 4, 3)), include=None)


def test_the_report():
    model = Net(ResNet(18, base_channels=8))
    before = sum(p.numel() for p in model.parameters())
    report = convert_to_odconv(model, kernel_num=2, exclude='layer4')
    assert report.parameters_before == before
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert report.reasons() == {'excluded': 5, '1×1 shortcut': 2, 'stem': 1}
    text = str(report)
    assert 'backbone.layer*.*.conv* (12)' in text
    assert 'kept: stem' in text
    assert f'parameters: {before / 1e6:.2f} M before' in text
    details = report.details()
    assert all(name in details for name in report.converted)
    assert all(name in details for name, _ in report.kept)


def test_a_converted_model_can_be_copied_converted_further_and_pickled():
    model = Net(ResNet(18, base_channels=8), RetinaHead(3, 8, feat_channels=8))
    convert_to_odconv(model)
    report = convert_to_odconv(model, include='cls_convs')
    assert len(report.converted) == 4
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(twin.eval()(x)[-1], model.eval()(x)[-1])


@pytest.mark.parametrize(
    ('head', 'norm', 'warned'),
    [
        (RetinaHead(2, 8, feat_channels=8, stacked_convs=1), 'BN', True),
        (RetinaHead(2, 8, feat_channels=8, stacked_convs=1), 'CalibratedNorm', True),
        (RetinaHead(2, 8, feat_channels=8, stacked_convs=1), 'LN', False),
        (YOLOXHead(2, 8, feat_channels=8, stacked_convs=1), 'BN', False),
    ],
    ids=['shared', 'shared, CalibratedNorm', 'shared, LN', 'a head for each level'],
)
def test_statistics_that_pyramid_levels_share_are_warned_of(head, norm, warned):
    model = Net(nn.Sequential(nn.Conv2d(8, 8, 3)), head)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        convert_to_odconv(model, include='bbox_head', norm_cfg=dict(type=norm))
    assert any('every level of the pyramid' in str(w.message) for w in caught) == warned
