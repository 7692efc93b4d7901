import copy

import pytest
import torch
from mmcv.cnn import ConvModule, build_conv_layer
from torch import nn

from mmdet_odconv import ODConv1d, ODConv2d, ODConv3d
from tests.conftest import ROOT, SHARED, load_cases
from tests.reference import randomise, reference_forward, relative_error

LAYERS = {1: ODConv1d, 2: ODConv2d, 3: ODConv3d}
PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (9,), 2: (7, 6), 3: (5, 6, 4)}


def check_against_reference(layer, x):
    """Output and all gradients equal those of the loop over samples."""
    results = []
    for forward in (layer, lambda x: reference_forward(layer, x)):
        layer.zero_grad()
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        statistics = copy.deepcopy(dict(layer.named_buffers()))
        y = forward(leaf)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        (y * weights).sum().backward()
        layer.load_state_dict(statistics, strict=False)
        results.append([y, leaf.grad, *[p.grad.clone() for p in layer.parameters()]])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


OPTIONS = {
    'plain': {},
    'K1': dict(kernel_num=1),
    'K5': dict(kernel_num=5),
    '1x1': dict(kernel_size=1),
    '1x1_K1': dict(kernel_size=1, kernel_num=1),
    'stride': dict(stride=2, padding=1),
    'dilation': dict(dilation=2, padding=2),
    'groups': dict(groups=2),
    'depthwise': dict(groups=4, out_channels=4),
    'depthwise_K1': dict(groups=4, out_channels=4, kernel_num=1),
    'depth_multiplier': dict(groups=4, out_channels=8),
    'bias': dict(bias=True),
    'same': dict(padding='same'),
    'same_even_kernel': dict(padding='same', kernel_size=2),
    'valid': dict(padding='valid'),
    'reflect': dict(padding=1, padding_mode='reflect'),
    'circular_same': dict(padding='same', padding_mode='circular', dilation=2),
    'replicate_same_even': dict(padding='same', padding_mode='replicate', kernel_size=2),
    'reflect_valid': dict(padding='valid', padding_mode='reflect'),
    'temperature': dict(temperature=7.5),
    'layer_norm': dict(norm_cfg=dict(type='LN')),
    'no_norm': dict(norm_cfg=None),
    'reduction': dict(reduction=0.5, min_attention_channels=1),
}


@pytest.mark.parametrize(
    ('ndim', 'option', 'training'),
    [(n, option, (i + n) % 2 == 0) for n in (1, 2, 3) for i, option in enumerate(OPTIONS)],
)
def test_every_option_equals_the_formula(ndim, option, training):
    args = dict(in_channels=4, out_channels=6, kernel_size=3, bias=False) | OPTIONS[option]
    layer = LAYERS[ndim](**args, dtype=torch.float64).train(training)
    randomise(layer)
    check_against_reference(layer, torch.randn(3, 4, *SIZES[ndim], dtype=torch.float64))


def shared_layer_cases():
    """The cases in the repository, and those in ../shared/reference where it is present."""
    cases = {c['name']: c for c in load_cases(ROOT / 'tests/data/layers/cases.json')}
    shared = SHARED.parent / 'reference' / 'layers.json'
    if shared.is_file():
        cases |= {c['name']: c for c in load_cases(shared)}
    return list(cases.values())


def layer_arrays(name):
    import numpy as np

    path = ROOT / f'tests/data/layers/{name}.npz'
    if path.is_file():
        return dict(np.load(path))
    arrays = np.load(SHARED.parent / 'reference' / 'layers.npz')
    return {k.removeprefix(f'{name}/'): arrays[k] for k in arrays if k.startswith(f'{name}/')}


@pytest.mark.parametrize('case', shared_layer_cases(), ids=lambda case: case['name'])
def test_equals_the_published_implementation(case):
    case = dict(case)
    arrays = layer_arrays(case.pop('name'))
    training = case.pop('train')
    layer = ODConv2d(**case, bias=False, dtype=torch.float64).train(training)
    prefix = 'state/'
    layer.load_state_dict(
        {k[len(prefix) :]: torch.from_numpy(v) for k, v in arrays.items() if k.startswith(prefix)}
    )
    x = torch.from_numpy(arrays['x']).requires_grad_()
    y = layer(x)
    y.backward(torch.from_numpy(arrays['grad_y']))
    assert relative_error(y, arrays['y']) < 1e-10
    assert relative_error(x.grad, arrays['grad/x']) < 1e-10
    for name, parameter in layer.named_parameters():
        assert relative_error(parameter.grad, arrays[f'grad/{name}']) < 1e-10, name
    for key, value in arrays.items():
        if key.startswith('state_after/'):
            actual = layer.state_dict()[key.removeprefix('state_after/')]
            assert relative_error(actual, value) < 1e-10, key


@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize('kernel_num', [1, 4])
def test_empty_batch_trains(groups, kernel_num):
    layer = ODConv2d(4, 4, 3, padding=1, stride=2, groups=groups, kernel_num=kernel_num)
    x = torch.empty(0, 4, 8, 8, requires_grad=True)
    y = layer(x)
    assert y.shape == (0, 4, 4, 4)
    y.sum().backward()
    # DDP waits for the gradient of every parameter.
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
    assert torch.equal(layer.attention.bn.running_mean, torch.zeros(16))


def test_one_sample_trains_with_the_running_statistics_and_leaves_them():
    layer = ODConv2d(4, 6, 3, dtype=torch.float64).train()
    randomise(layer)
    before = copy.deepcopy(layer.attention.bn.state_dict())
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    check_against_reference(layer, x)
    torch.testing.assert_close(layer(x), copy.deepcopy(layer).eval()(x))
    for key, value in layer.attention.bn.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_two_samples_train_with_the_statistics_of_the_batch():
    layer = ODConv2d(4, 6, 3).train()
    layer(torch.randn(2, 4, 8, 8))
    assert layer.attention.bn.num_batches_tracked == 1
    assert layer.attention.bn.running_mean.abs().sum() > 0


@pytest.mark.parametrize('layout', ['channels_last', 'non_contiguous', 'expanded'])
def test_memory_layout_does_not_matter(layout):
    layer = ODConv2d(4, 6, 3, padding=1, dtype=torch.float64)
    randomise(layer)
    x = torch.randn(2, 4, 8, 6, dtype=torch.float64)
    if layout == 'channels_last':
        other = x.to(memory_format=torch.channels_last)
    elif layout == 'non_contiguous':
        other = x.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        x = x[:, :1].expand(-1, 4, -1, -1)
        other, x = x, x.contiguous()
    torch.testing.assert_close(layer(other), layer(x), rtol=1e-12, atol=1e-12)
    check_against_reference(layer, other)


@pytest.mark.parametrize('kernel_size', [1, 3])
@pytest.mark.parametrize('kernel_num', [1, 4])
@pytest.mark.parametrize('norm', ['BN', 'LN', None])
def test_bfloat16_autocast_forward_and_backward(kernel_size, kernel_num, norm):
    norm_cfg = None if norm is None else dict(type=norm)
    layer = ODConv2d(8, 16, kernel_size, kernel_num=kernel_num, norm_cfg=norm_cfg)
    randomise(layer)
    x = torch.randn(2, 8, 8, 8, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16):
        y = layer(x)
        attentions = layer.attention(x)
    assert y.dtype == torch.bfloat16
    assert attentions.channel.dtype == torch.float32
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in (x, *layer.parameters()))
    full = layer(x)
    assert (y - full).abs().max() < 0.05 * full.abs().max()


def test_unbatched_input():
    layer = ODConv2d(4, 6, 3).eval()
    x = torch.randn(4, 8, 8)
    torch.testing.assert_close(layer(x), layer(x[None])[0])


def test_double_use_in_one_graph():
    layer = ODConv2d(4, 4, 3, padding=1, dtype=torch.float64).eval()
    randomise(layer)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(layer(x)), (x,))


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (dict(kernel_num=0), 'kernel_num.*got 0'),
        (dict(kernel_num='four'), "kernel_num must be an integer, got 'four'"),
        (dict(kernel_num=2.5), 'kernel_num must be an integer, got 2.5'),
        (dict(kernel_num=True), 'kernel_num must be an integer, got True'),
        (dict(reduction='1/16'), "reduction must be a number, got '1/16'"),
        (dict(temperature=None), 'temperature must be a number, got None'),
        (dict(attention_bias='high'), "attention_bias must be a number, got 'high'"),
        (dict(min_attention_channels=1.5), 'min_attention_channels must be an integer, got 1.5'),
        (dict(out_channels=6.0), r'out_channels must be an integer, got 6\.0'),
        (dict(kernel_size='3'), "kernel_size .*2 ints.*got '3'"),
        (dict(stride=1.5), 'stride .*2 ints.*got 1.5'),
        (dict(strategy='fastest'), "strategy must be .*got 'fastest'"),
        (dict(spread='wide'), "spread must be a number, got 'wide'"),
        (dict(spread=-1), 'spread must not be negative, got -1'),
        (dict(reduction=float('inf')), 'reduction must be finite, got inf'),
        (dict(kernel_size=True), 'kernel_size .*2 ints.*got True'),
        (dict(reduction=0), 'reduction.*got 0'),
        (dict(reduction=-0.5), 'reduction.*got -0.5'),
        (dict(temperature=0), 'temperature.*got 0'),
        (dict(temperature=float('nan')), 'temperature.*got nan'),
        (dict(min_attention_channels=0), 'min_attention_channels.*got 0'),
        (dict(attention_init='ones'), "attention_init.*'ones'"),
        (dict(groups=3), 'in_channels.*divisible.*in_channels=4 and groups=3'),
        (dict(groups=4, out_channels=6), 'out_channels.*out_channels=6 and groups=4'),
        (dict(groups=0), 'groups.*got 0'),
        (dict(in_channels=0), 'in_channels.*got 0'),
        (dict(kernel_size=0), 'kernel_size.*got 0'),
        (dict(kernel_size=(3, 3, 3)), r'kernel_size.*2 ints.*got \(3, 3, 3\)'),
        (dict(stride=0), 'stride.*got 0'),
        (dict(padding=-1), 'padding.*got -1'),
        (dict(padding='full'), "padding.*'full'"),
        (dict(padding='same', stride=2), r"'same'.*stride=\(2, 2\)"),
        (dict(padding_mode='mirror'), "padding_mode.*'mirror'"),
    ],
)
def test_bad_arguments_are_named_with_their_value(args, message):
    with pytest.raises(ValueError, match=message):
        ODConv2d(**(dict(in_channels=4, out_channels=6, kernel_size=3) | args))


@pytest.mark.parametrize(
    ('shape', 'message'),
    [((2, 5, 8, 8), r'expects 4 input channels, got 5'), ((2, 8), r'4 dimensions.*\(2, 8\)')],
)
def test_bad_inputs_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        ODConv2d(4, 6, 3)(torch.randn(shape))


@pytest.mark.parametrize('ndim', [1, 2, 3])
def test_stands_in_for_the_plain_convolution(ndim):
    """Positional arguments are nn.ConvNd's, and the output has the plain convolution's shape."""
    args = (4, 8, 3, 2, 1, 1, 2, True, 'zeros')
    x = torch.randn(2, 4, *SIZES[ndim])
    layer, plain = LAYERS[ndim](*args), PLAIN[ndim](*args)
    assert layer(x).shape == plain(x).shape
    twin = LAYERS[ndim].like(plain.double(), kernel_num=2)
    assert twin(x.double()).shape == plain(x.double()).shape
    assert twin.weight.dtype == torch.float64
    assert twin.weight.shape == (2, *plain.weight.shape)


def test_device_and_dtype_arguments():
    layer = ODConv2d(4, 8, 3, device='meta', dtype=torch.float16)
    tensors = [*layer.parameters(), layer.attention.bn.running_mean]
    assert all(t.is_meta and t.dtype == torch.float16 for t in tensors)


def test_published_initialisation_is_kaiming_fan_out():
    layer = ODConv2d(256, 128, 3, attention_init='published')
    for kernel in layer.weight:
        assert kernel.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.05)
    weight = layer.attention.channel_fc.weight
    assert weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.1)
    assert not layer.attention.channel_fc.bias.any()
    assert not layer.bias.any()


def test_zero_initialisation_starts_as_one_scaled_plain_convolution():
    layer = ODConv2d(4, 6, 3, kernel_num=3, attention_bias=0.0, dtype=torch.float64)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    expected = nn.functional.conv2d(x, layer.weight.mean(0)) / 8
    torch.testing.assert_close(layer(x), expected)


def test_all_parameters_get_a_gradient_after_one_step_from_the_zero_initialisation():
    layer = ODConv2d(4, 6, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(4, 4, 8, 8)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    assert all(p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize('name', ['ODConv', 'ODConv2d'])
def test_builds_from_a_config(name):
    conv = build_conv_layer(dict(type=name, kernel_num=2), 4, 8, 3, padding=1)
    assert type(conv) is ODConv2d
    assert conv.kernel_num == 2


def test_conv_module_keeps_the_layers_own_initialisation():
    torch.manual_seed(0)
    module = ConvModule(64, 64, 3, conv_cfg=dict(type='ODConv'), norm_cfg=dict(type='BN'))
    module.init_weights()
    assert not module.conv.attention.channel_fc.weight.any()
    expected = (2 / (64 * 9)) ** 0.5
    assert module.conv.weight.std().item() == pytest.approx(expected, rel=0.05)


def test_with_checkpointing_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    layer = ODConv2d(4, 6, 3, dtype=torch.float64).eval()
    randomise(layer)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    grads = []
    for forward in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        forward(x).square().sum().backward()
        grads.append(layer.weight.grad.clone())
    torch.testing.assert_close(*grads)
