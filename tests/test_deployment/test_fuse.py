"""fuse_odconv_bn: the same outputs with fewer norms, and hands off what it cannot follow."""

import copy
import logging
import pickle
from functools import partial

import pytest
import torch
from mmcv.cnn import ConvModule
from mmdet.models.backbones import HRNet, Res2Net
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.model.utils import revert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mmdet_odconv import (
    CondConv2d,
    DyConv2d,
    ODConv1d,
    ODConv2d,
    ODConv3d,
    ODMobileNetV2,
    ODResNet,
    ODResNetV1d,
    ODResNeXt,
    convert_to_odconv,
    fuse_odconv_bn,
)
from mmdet_odconv.conversion import patch_fuse_methods
from mmdet_odconv.layers import ODAttention
from tests.conftest import ROOT
from tests.reference import randomise, relative_error


def prepare(model, dtype=torch.float64):
    """In evaluation mode, with norms and attentions that do something."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
                if module.affine:
                    module.weight.normal_(1, 0.1)
                    module.bias.normal_(0, 0.1)
            if isinstance(module, ODConv1d | ODConv2d | ODConv3d):
                for name, head in module.attention.named_children():
                    if name.endswith('_fc'):
                        head.weight.normal_(std=0.5)
    model.to(dtype).train(False)
    return model


def norms(model):
    return [name for name, m in model.named_modules() if isinstance(m, _BatchNorm)]


def flat(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [tensor for output in outputs for tensor in flat(output)]


def check(model, x, left=(), bound=1e-12):
    """Fusing leaves the outputs, and just the norms named."""
    with torch.no_grad():
        expected = flat(model(x))
        assert fuse_odconv_bn(model) is model
        assert norms(model) == list(left)
        actual = flat(model(x))
    assert max(map(relative_error, actual, expected)) < bound


BACKBONES = {
    'resnet18': lambda: ODResNet(depth=18, base_channels=8),
    'resnet50': lambda: ODResNet(depth=50, base_channels=8, kernel_num=2),
    'resnet_v1d': lambda: ODResNetV1d(depth=18, base_channels=8, stem_channels=8),
    'resnext': lambda: ODResNeXt(depth=50, groups=4, base_width=4, base_channels=8),
    'mobilenet': lambda: ODMobileNetV2(widen_factor=0.5, kernel_num=2, out_indices=(1, 2, 4, 7)),
    'layer_norm': lambda: ODResNet(
        depth=18, base_channels=8, odconv_cfg=dict(norm_cfg=dict(type='LN'))
    ),
    'res2net': lambda: Res2Net(depth=50, base_channels=8, scales=4, base_width=8),
}


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize(('dtype', 'bound'), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_whole_backbones(name, dtype, bound):
    model = prepare(BACKBONES[name](), dtype)
    check(model, torch.randn(2, 3, 64, 64, dtype=dtype), bound=bound)


def detector():
    register_all_modules()
    config = Config.fromfile(ROOT / 'configs/odconv/retinanet_od_r18_shapes.py').model
    config.backbone.base_channels = 8
    config.neck.in_channels = [8, 16, 32, 64]
    config.bbox_head.norm_cfg = dict(type='BN')
    return MODELS.build(config)


@pytest.mark.parametrize(('dtype', 'bound'), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_whole_detector_with_a_head_shared_by_the_levels(dtype, bound):
    check(prepare(detector(), dtype), torch.randn(2, 3, 64, 96, dtype=dtype), bound=bound)


def test_sep_bn_heads_share_a_convolution_between_norms():
    register_all_modules()
    head = MODELS.build(
        dict(
            type='RTMDetSepBNHead',
            num_classes=3,
            in_channels=8,
            feat_channels=8,
            stacked_convs=2,
            share_conv=True,
            pred_kernel_size=1,
            exp_on_reg=False,
            anchor_generator=dict(type='MlvlPointGenerator', strides=[8, 16]),
            bbox_coder=dict(type='DistancePointBBoxCoder'),
            loss_cls=dict(type='QualityFocalLoss'),
            loss_bbox=dict(type='GIoULoss'),
            norm_cfg=dict(type='BN'),
        )
    )
    prepare(head)
    assert len(norms(head)) == 8
    x = [torch.randn(2, 8, size, size, dtype=torch.float64) for size in (8, 4)]
    check(head, x, left=norms(head))


def sequence(*layers):
    return prepare(nn.Sequential(*layers))


X = {n: torch.randn(3, 4, *(7,) * n, dtype=torch.float64) for n in (1, 2, 3)}


@pytest.mark.parametrize('ndim', [1, 2, 3])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('affine', [True, False])
def test_every_dimension_bias_and_affine(ndim, bias, affine):
    dynamic = {1: ODConv1d, 2: ODConv2d, 3: ODConv3d}[ndim]
    plain = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[ndim]
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[ndim]
    model = nn.Sequential(
        *(dynamic(4, 6, 3, bias=bias), norm(6, affine=affine), nn.ReLU()),
        *(plain(6, 4, 1, groups=2, bias=bias), norm(4, affine=affine)),
    )
    check(prepare(model), X[ndim])


def test_an_odconv_between_a_plain_convolution_and_a_norm():
    check(sequence(nn.Conv2d(4, 6, 3), ODConv2d(6, 6, 1), nn.BatchNorm2d(6)), X[2])


@pytest.mark.parametrize('kernel_num', [1, 4])
def test_depthwise_layers(kernel_num):
    conv = ODConv2d(4, 4, 3, groups=4, kernel_num=kernel_num)
    check(sequence(conv, nn.BatchNorm2d(4)), X[2])


def test_what_does_not_follow_directly_stays():
    check(sequence(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), X[2], left=['2'])
    check(sequence(nn.BatchNorm2d(4), ODConv2d(4, 4, 3)), X[2], left=['0'])


def test_the_order_of_a_conv_module_counts():
    args = dict(norm_cfg=dict(type='BN'), conv_cfg=dict(type='ODConv'))
    for order, left in (
        (('conv', 'norm', 'act'), []),
        (('act', 'conv', 'norm'), []),
        (('norm', 'conv', 'act'), ['bn']),
        (('conv', 'act', 'norm'), ['bn']),
    ):
        check(prepare(ConvModule(4, 4, 3, order=order, **args)), X[2], left=left)


class Registered(nn.Module):
    """Layers registered in another order than they run in."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3), ODConv2d(4, 4, 3)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))


class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = ODConv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.conv(self.bn(x).relu())


class ReadTwice(nn.Module):
    """The norm is not all that becomes of the convolution's output."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = ODConv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return y + self.bn(y)


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = ODConv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)), self.conv(x)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = ODConv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ('model', 'left'),
    [
        (Registered, []),
        (PreActivation, ['bn']),
        (ReadTwice, ['bn']),
        (CalledTwice, ['bn']),
        (Untraceable, ['bn']),
    ],
)
def test_the_order_of_execution_counts(model, left):
    check(prepare(model()), X[2], left=left)


def test_modules_and_parameters_at_several_places_stay():
    conv, norm = ODConv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    model = sequence(
        *(nn.Sequential(conv, nn.BatchNorm2d(4)), nn.Sequential(conv, nn.BatchNorm2d(4))),
    )
    check(model, X[2], left=['0.1', '1.1'])
    model = sequence(nn.Sequential(nn.Conv2d(4, 4, 3), norm), nn.Sequential(nn.ReLU(), norm))
    check(model, X[2], left=['0.1'])
    tied = nn.Conv2d(4, 4, 3)
    tied.weight = nn.Parameter(tied.weight.double())
    other = nn.Conv2d(4, 4, 3)
    other.weight = tied.weight
    check(prepare(nn.Sequential(tied, nn.BatchNorm2d(4), other)), X[2], left=['1'])


def test_hooks_keep_what_they_look_at():
    model = sequence(ODConv2d(4, 6, 3), nn.BatchNorm2d(6))
    model[0].register_forward_hook(lambda *_: None)
    check(model, X[2], left=['1'])


def test_norms_that_are_no_constants_stay():
    model = sequence(ODConv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False))
    check(model, X[2], left=['1'])

    class OwnNorm(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) ** 2

    check(sequence(ODConv2d(4, 6, 3), OwnNorm(6)), X[2], left=['1'])

    training = sequence(ODConv2d(4, 6, 3), nn.BatchNorm2d(6)).train()
    before = copy.deepcopy(training.state_dict())
    fuse_odconv_bn(training)
    assert norms(training) == ['0.attention.bn', '1']
    assert list(training.state_dict()) == list(before)


def test_subclasses_of_convolutions_stay():
    class OwnConv(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) ** 2

    check(sequence(OwnConv(4, 6, 3), nn.BatchNorm2d(6)), X[2], left=['1'])
    check(sequence(nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6)), X[2], left=['1'])
    weighted = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3))
    check(sequence(weighted, nn.BatchNorm2d(6)), X[2], left=['1'])


def test_checkpointed_blocks_are_fused():
    model = prepare(ODResNet(depth=18, base_channels=8, with_cp=True))
    check(model, torch.randn(2, 3, 64, 64, dtype=torch.float64))


@pytest.mark.parametrize(
    ('model', 'message', 'level'),
    [
        (nn.Sequential(ODConv2d(4, 6, 3), nn.BatchNorm2d(6)), 'folded 2 BatchNorms', 'INFO'),
        (
            nn.Sequential(nn.BatchNorm2d(4), ODConv2d(4, 6, 3)),
            'folded 1 BatchNorms and kept 1: 0',
            'WARNING',
        ),
    ],
)
def test_the_log_says_what_was_folded(model, message, level, monkeypatch):
    told = []
    monkeypatch.setattr(
        'mmdet_odconv.deployment.fuse.print_log',
        lambda text, logger, level: told.append((text, logging.getLevelName(level))),
    )
    fuse_odconv_bn(model.eval())
    products = 'it made two products of 1 of 1 attentions'
    assert told == [(f'prepare_for_inference {message}; {products}', level)]


NORMS = [dict(type='BN'), dict(type='CalibratedNorm'), dict(type='LN'), None]


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('kind', [ODConv1d, ODConv2d, ODConv3d, CondConv2d, DyConv2d])
@pytest.mark.parametrize('kernel_num', [1, 3])
def test_an_attention_becomes_two_products(kind, kernel_num, norm):
    options = dict(temperature=3.0)
    if kind in (CondConv2d, DyConv2d):
        options = {}
    elif norm is not None or kernel_num == 1:
        options['norm_cfg'] = norm
    model = nn.Sequential(kind(4, 6, 3, kernel_num=max(kernel_num, 2 - len(options)), **options))
    model.double().eval()
    randomise(model)
    check(model, X[model[0].ndim], bound=1e-10)
    attention = model[0].attention
    keeps_norm = 'norm_cfg' in options and norm == dict(type='LN')
    assert [type(child) for child in attention.children()] == [nn.LayerNorm] * keeps_norm
    products = {n.partition('_')[0] for n, _ in attention.named_parameters(recurse=False)}
    assert products == ({'head'} if kind is CondConv2d else {'fc', 'head'})
    assert copy.deepcopy(model)[0].temperature == 1.0
    with pytest.raises(RuntimeError, match='temperature inside'):
        model[0].temperature = 2.0


def test_an_attention_that_something_else_reads_stays():
    for change in (
        lambda a: a.kernel_fc.register_forward_hook(lambda *_: None),
        lambda a: prune.l1_unstructured(a.fc, 'weight', 1),
        lambda a: a.train(),
        lambda a: setattr(a, 'bn', nn.GroupNorm(4, 16)),
    ):
        model = sequence(ODConv2d(4, 6, 3)).float()
        change(model[0].attention)
        x = torch.randn(4, 4, 6, 6)
        expected = model(x)
        torch.testing.assert_close(fuse_odconv_bn(model)(x), expected, rtol=1e-4, atol=1e-5)
        assert isinstance(model[0].attention, ODAttention)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_a_prepared_attention_in_narrow_types(dtype):
    model = nn.Sequential(ODConv2d(4, 6, 3)).eval()
    randomise(model)
    expected = model(X[2].float())
    fuse_odconv_bn(model)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert relative_error(model(X[2].float()).float(), expected) < 0.03
    assert relative_error(model.to(dtype)(X[2].to(dtype)).float(), expected) < 0.03


def test_synchronised_and_reverted_norms():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(sequence(ODConv2d(4, 6, 3), nn.BatchNorm2d(6)))
    model.eval()  # which the conversion forgets before torch 2.2
    check(revert_sync_batchnorm(copy.deepcopy(model)), X[2])
    assert not norms(fuse_odconv_bn(model))


def test_fusing_twice_is_fusing_once_and_gradients_stay_off():
    model = sequence(ODConv2d(4, 6, 3), nn.BatchNorm2d(6))
    model.requires_grad_(False)
    fuse_odconv_bn(model)
    state = copy.deepcopy(model.state_dict())
    fuse_odconv_bn(model)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())


def test_hrnet_with_converted_blocks():
    stage = dict(num_modules=1, block='BASIC')
    model = HRNet(
        extra=dict(
            stage1=dict(num_modules=1, num_branches=1, block='BOTTLENECK', num_blocks=(1,))
            | dict(num_channels=(8,)),
            stage2=stage | dict(num_branches=2, num_blocks=(1,) * 2, num_channels=(8, 16)),
            stage3=stage | dict(num_branches=3, num_blocks=(1,) * 3, num_channels=(8, 16, 32)),
            stage4=stage | dict(num_branches=4, num_blocks=(1,) * 4, num_channels=(8, 16, 32, 64)),
        )
    )
    block = model.stage2[0].branches[0][0]
    block.conv1 = ODConv2d.like(block.conv1)
    check(prepare(model), torch.randn(1, 3, 64, 64, dtype=torch.float64))


def test_parameters_and_statistics_of_any_size():
    layer = nn.Sequential(ODConv2d(4, 6, 3, kernel_num=3), nn.BatchNorm2d(6)).double().eval()
    randomise(layer)
    check(layer, X[2], bound=1e-10)


def fuse_conv_and_bn(conv, norm):
    """What Ultralytics' function of this name does."""
    conv.weight, conv.bias = fuse_conv_bn_weights(
        *(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps),
        *(norm.weight, norm.bias),
    )
    return conv.requires_grad_(False)


class UltralyticsConv(nn.Module):
    """A stand-in for Ultralytics' block of this kind."""

    def __init__(self, in_channels, out_channels, stride=1, conv=nn.Conv2d):
        super().__init__()
        self.conv = conv(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x):
        return self.act(self.conv(x))


class UltralyticsModel(nn.Module):
    """A stand-in for Ultralytics' model, which fuses its blocks before validation."""

    def __init__(self, conv=nn.Conv2d):
        super().__init__()
        self.model = nn.Sequential(
            UltralyticsConv(3, 8), UltralyticsConv(8, 32, 2, conv), UltralyticsConv(32, 4, 1, conv)
        )

    def forward(self, x):
        return self.model(x)

    def fuse(self, verbose=True):
        for block in self.model.modules():
            if isinstance(block, UltralyticsConv) and hasattr(block, 'bn'):
                block.conv = fuse_conv_and_bn(block.conv, block.bn)
                del block.bn
                block.forward = block.forward_fuse
        return self, verbose


def check_fuse_method(model):
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    prepare(model)
    with torch.no_grad():
        expected = model(x)
        assert model.fuse(verbose=False) == (model, False)
        assert all('.attention.' in name for name in norms(model))
        assert relative_error(model(x), expected) < 1e-12


# 32 and 4 are the numbers of output channels, for which nothing would raise.
@pytest.mark.parametrize('kernel_num', [1, 2, 4, 32])
def test_a_fuse_method_of_a_converted_model_is_right(kernel_num):
    model = UltralyticsModel()
    assert len(convert_to_odconv(model, kernel_num, include='.*').converted) == 2
    copied = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    for variant in (model, copied, pickled):
        check_fuse_method(variant)


def test_a_fuse_method_of_a_model_built_by_hand_can_be_made_right():
    model = UltralyticsModel(ODConv2d)
    patch_fuse_methods(model)
    check_fuse_method(model)


def test_a_fuse_method_finds_nothing_left_after_fuse_odconv_bn():
    model = UltralyticsModel(ODConv2d)
    prepare(model)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        fuse_odconv_bn(model).fuse()
        assert not norms(model)
        assert relative_error(model(x), expected) < 1e-12


def test_a_converted_model_trains_until_it_is_fused():
    model = UltralyticsModel()
    convert_to_odconv(model, include='.*')
    model.train()(torch.randn(2, 3, 16, 16)).sum().backward()
    assert model.model[1].bn.weight.grad is not None


@pytest.mark.parametrize('kernel_num', [1, 32])
def test_fusing_an_odconv_as_a_plain_convolution_is_refused(kernel_num):
    block = UltralyticsConv(8, 32, conv=partial(ODConv2d, kernel_num=kernel_num)).eval()
    with pytest.raises(RuntimeError, match=r'use mmdet_odconv\.fuse_odconv_bn'):
        fuse_conv_and_bn(block.conv, block.bn)


def test_ultralytics_itself():
    tasks = pytest.importorskip('ultralytics.nn.tasks', reason='ultralytics is not installed')
    model = tasks.DetectionModel('yolo11n.yaml', nc=2, verbose=False)
    report = convert_to_odconv(model, include=r'^model\.\d\.')
    assert len(report.converted) > 20
    prepare(model)
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = flat(list(model(x)[:1]))
        model.fuse(verbose=False)
        assert not [name for name in norms(model) if '.attention.' not in name]
        assert relative_error(flat(list(model(x)[:1]))[0], expected[0]) < 1e-12
