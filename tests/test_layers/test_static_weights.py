"""A static state dict, loaded into ODConv layers, keeps computing what it computed."""

import copy

import pytest
import torch
from mmdet.models.backbones import MobileNetV2, ResNet
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from mmengine.utils import digit_version
from torch import nn

from mmdet_odconv import ODConv1d, ODConv2d, ODConv3d, ODMobileNetV2, ODResNet
from tests.conftest import ROOT
from tests.predictions import assert_same_predictions, predict
from tests.reference import randomise, relative_error

LAYERS = {1: ODConv1d, 2: ODConv2d, 3: ODConv3d}
PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
OPTIONS = {
    'default': {},
    'K1': dict(kernel_num=1),
    '1x1': dict(kernel_size=1),
    '1x1_K1': dict(kernel_size=1, kernel_num=1),
    'groups': dict(groups=2),
    'depthwise': dict(groups=4, out_channels=4),
    'no_bias': dict(bias=False),
    'reflect': dict(padding=1, padding_mode='reflect'),
    'temperature': dict(temperature=7.5),
    'bias_of_the_heads': dict(attention_bias=0.0),
    'published': dict(attention_init='published'),
    'layer_norm': dict(norm_cfg=dict(type='LN')),
    'no_norm': dict(norm_cfg=None),
    'no_spread': dict(spread=0.0),
}
CONV = ('in_channels', 'out_channels', 'kernel_size', 'groups', 'bias', 'padding', 'padding_mode')


def by_torch(module, state_dict):
    module.load_state_dict(state_dict, strict=True)


def by_mmengine(module, state_dict):
    _load_checkpoint_to_model(module, {'state_dict': state_dict}, strict=True)


def pair(ndim=2, dtype=torch.float64, **options):
    """A plain convolution, and an ODConv layer of its geometry with other weights."""
    args = dict(in_channels=4, out_channels=6, kernel_size=3) | options
    plain = PLAIN[ndim](**{k: v for k, v in args.items() if k in CONV}, dtype=dtype)
    own = {k: v for k, v in args.items() if k not in CONV}
    layer = LAYERS[ndim].like(plain, **own)
    randomise(layer)
    return plain, layer


def sample(ndim=2, batch=3, dtype=torch.float64):
    return torch.randn(batch, 4, *(7, 6, 5)[:ndim], dtype=dtype)


@pytest.mark.parametrize(
    ('ndim', 'option', 'load'),
    [
        (n, option, (by_torch, by_mmengine)[(i + n) % 2])
        for n in (1, 2, 3)
        for i, option in enumerate(OPTIONS)
    ],
)
def test_the_function_stays(ndim, option, load):
    plain, layer = pair(ndim, **OPTIONS[option])
    load(layer, plain.state_dict())
    for training in (True, False):
        for batch in (3, 1):
            x = sample(ndim, batch)
            assert relative_error(layer.train(training)(x), plain(x)) < 1e-12


@pytest.mark.parametrize(
    ('dtype', 'bound'), [(torch.float32, 1e-6), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)]
)
def test_the_function_stays_in_narrower_types(dtype, bound):
    plain, layer = pair(dtype=dtype)
    by_torch(layer, plain.state_dict())
    assert layer.weight.dtype == dtype
    x = sample(dtype=dtype)
    if dtype == torch.float16 and digit_version(torch.__version__) < digit_version('2.2'):
        pytest.skip('torch before 2.2 has no matrix product of that type on a CPU')
    assert relative_error(layer.eval()(x), plain(x)) < bound


def test_weights_of_another_type_lose_nothing():
    plain, _ = pair(dtype=torch.float32)
    _, layer = pair(dtype=torch.float64)
    by_torch(layer, plain.state_dict())
    x = sample()
    assert relative_error(layer(x), plain.double()(x)) < 1e-12


@pytest.mark.parametrize('load', [by_torch, by_mmengine])
def test_the_given_dict_is_not_changed(load):
    plain, layer = pair()
    for model, state in (
        (layer, plain.state_dict()),
        (nn.Sequential(layer), nn.Sequential(plain).state_dict()),
    ):
        before = copy.deepcopy(state)
        load(model, state)
        assert list(state) == list(before)
        assert all(torch.equal(state[name], before[name]) for name in state)


def test_assigned_weights():
    plain, layer = pair()
    layer.load_state_dict(plain.state_dict(), assign=True)
    x = sample()
    assert relative_error(layer(x), plain(x)) < 1e-12
    assert all(p.requires_grad and p.is_leaf for p in layer.parameters())


def test_every_process_draws_the_same_bank():
    """Each loads for itself, with a generator in a state of its own."""
    plain, layer = pair()
    banks = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        other = copy.deepcopy(layer)
        state = torch.get_rng_state()
        by_torch(other, plain.state_dict())
        assert torch.equal(torch.get_rng_state(), state)
        banks.append(other.state_dict())
    assert all(torch.equal(banks[0][name], banks[1][name]) for name in banks[0])


def test_layers_of_other_names_draw_other_banks():
    plain, layer = pair()
    model = nn.Sequential(layer, copy.deepcopy(layer))
    by_torch(model, nn.Sequential(plain, plain).state_dict())
    assert not torch.equal(model[0].weight, model[1].weight)


def test_a_wrong_shape_is_an_error_in_the_usual_words():
    plain, _ = pair(out_channels=8)
    _, layer = pair()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=r'size mismatch for weight.*\[8, 4, 3, 3\]'):
        layer.load_state_dict({'weight': plain.weight}, strict=False)
    assert all(torch.equal(layer.state_dict()[name], before[name]) for name in before)


def test_a_static_weight_with_attentions_is_an_error():
    plain, layer = pair()
    state = layer.state_dict() | {'weight': plain.weight}
    with pytest.raises(RuntimeError, match=r'size mismatch for weight.*\[6, 4, 3, 3\]'):
        layer.load_state_dict(state)


def test_what_else_is_missing_or_left_over_is_reported():
    plain, layer = pair()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "bias"\. $'):
        layer.load_state_dict({'weight': plain.weight})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "other"\. $'):
        layer.load_state_dict(plain.state_dict() | {'other': plain.weight})


def test_a_bank_of_ones_own_is_loaded_unchanged():
    _, layer = pair()
    _, other = pair()
    randomise(other)
    by_torch(other, layer.state_dict())
    for name, value in layer.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_the_kernels_part_in_training():
    plain, layer = pair()
    by_torch(layer, plain.state_dict())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    grads = []
    for _ in range(2):
        optimizer.zero_grad()
        layer(sample(batch=4)).square().mean().backward()
        grads.append(layer.weight.grad.clone())
        optimizer.step()
    torch.testing.assert_close(grads[0][0], grads[0][1])
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(grads[1][i], grads[1][j], rtol=1e-6, atol=1e-9)
            assert not torch.allclose(layer.weight[i], layer.weight[j])


@pytest.mark.parametrize(
    ('static', 'dynamic', 'args'),
    [
        (ResNet, ODResNet, dict(depth=18, base_channels=8)),
        (ResNet, ODResNet, dict(depth=50, base_channels=8)),
        (MobileNetV2, ODMobileNetV2, dict(widen_factor=0.5, out_indices=(1, 2, 4, 7))),
    ],
)
def test_init_cfg_takes_a_static_checkpoint(tmp_path, static, dynamic, args):
    donor = static(**args)
    randomise(donor)
    path = tmp_path / 'static.pth'
    torch.save(donor.state_dict(), path)
    model = dynamic(init_cfg=dict(type='Pretrained', checkpoint=str(path)), **args)
    for backbone in (model, donor):
        backbone.double().train(False)
    model.init_weights()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for actual, expected in zip(model(x), donor(x), strict=True):
        assert relative_error(actual, expected) < 1e-10


def detector(backbone):
    register_all_modules()
    config = Config.fromfile(ROOT / 'configs/odconv/retinanet_od_r18_shapes.py').model
    config.backbone.update(type=backbone, base_channels=16)
    config.neck.in_channels = [16, 32, 64, 128]
    config.test_cfg.score_thr = 0.0
    return MODELS.build(config)


@pytest.fixture(scope='module')
def detectors(tmp_path_factory):
    """A static RetinaNet and its twin, into which the static one's checkpoint was loaded."""
    torch.manual_seed(0)
    static = detector('ResNet').double()
    static.init_weights()
    calibrate(static)
    path = tmp_path_factory.mktemp('static') / 'static.pth'
    torch.save({'state_dict': static.state_dict(), 'meta': {}}, path)
    dynamic = detector('ODResNet').double()
    load_checkpoint(dynamic, str(path), strict=True)
    return static.eval(), dynamic.eval()


def calibrate(model):
    """Norm statistics and scales of a model that has seen images; scores that differ."""
    model.train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'backbone' in name and parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        model.bbox_head.retina_cls.weight.mul_(100)
        for _ in range(3):
            model(torch.randn(4, 3, 64, 64, dtype=torch.float64))


def test_a_static_detector_gives_the_same_outputs(detectors):
    x = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad():
        results = [[o for level in model(x) for o in level] for model in detectors]
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-10


def test_a_static_detector_gives_the_same_boxes_in_float32(detectors):
    batch = demo_mm_inputs(2, [[3, 96, 96], [3, 64, 80]], num_classes=5)
    static, dynamic = (copy.deepcopy(model).float() for model in detectors)
    assert_same_predictions(predict(dynamic, batch), predict(static, batch), score_atol=1e-4)


@pytest.mark.parametrize('spread', [0.0, 0.3, 2.0])
def test_the_spread_sets_the_kernels_apart_and_leaves_the_function(spread):
    plain, layer = pair(spread=spread, out_channels=64)
    layer.load_state_dict(plain.state_dict())
    x = sample()
    assert relative_error(layer(x), plain(x)) < 1e-12
    apart = layer.weight - layer.weight.mean(0)
    assert (apart.std() / layer.weight.mean(0).square().mean().sqrt()).item() == pytest.approx(
        spread, rel=0.05
    )
