"""All strategies compute the same function, and none keeps or makes what it need not."""

import importlib.util
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet_odconv import ODConv2d, ODMobileNetV2, ODResNet
from mmdet_odconv.functional import (
    STRATEGIES,
    Attentions,
    cpu_grouped_conv,
    cpu_im2col,
    odconv,
    record_strategies,
)
from tests.conftest import ROOT

SPEC = importlib.util.spec_from_file_location('benchmark', ROOT / 'tools/benchmark.py')
TOOL = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TOOL)

DTYPE = torch.float64
FAST = [name for name in STRATEGIES if name != 'reference']
OPTIONS = {
    'plain': {},
    'point': dict(kernel=1, padding=0),
    'point_stride': dict(kernel=1, padding=0, stride=2),
    'point_groups': dict(kernel=1, padding=0, groups=2),
    'stride': dict(stride=2),
    'dilation': dict(dilation=2),
    'groups': dict(groups=2),
    'depthwise': dict(groups=4, out_channels=4),
    'depthwise_stride': dict(groups=4, out_channels=4, stride=2),
    'same_even': dict(kernel=2, padding='same'),
    'valid': dict(padding='valid'),
    'no_padding': dict(padding=0),
    'large_kernel': dict(kernel=5, padding=2),
    'one_sample': dict(batch=1),
}

EVERYWHERE = ['plain', 'point', 'stride', 'groups', 'depthwise', 'same_even']


def problem(
    ndim=2, kernel_num=3, kernel=3, out_channels=6, batch=3, groups=1, dtype=DTYPE, channels=None
):
    """Inputs of ``odconv``: x, bank and the four attentions."""
    c_in, positions = 4, kernel**ndim
    if channels is not None:
        c_in, out_channels = channels
    draw = lambda *shape: torch.rand(*shape, dtype=dtype)  # noqa: E731
    attentions = Attentions(
        draw(batch, c_in),
        None if groups == c_in == out_channels else draw(batch, out_channels),
        None if positions == 1 else draw(batch, positions),
        None if kernel_num == 1 else draw(batch, kernel_num),
    )
    x = torch.randn(batch, c_in, *(6, 7, 5)[:ndim], dtype=dtype)
    bank = torch.randn(kernel_num, out_channels, c_in // groups, *(kernel,) * ndim, dtype=dtype)
    return x, bank, attentions


def outputs_and_gradients(x, bank, attentions, **options):
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, bank, *attentions)]
    y = odconv(leaves[0], leaves[1], Attentions(*leaves[2:]), **options)
    y.backward(torch.arange(y.numel()).double().cos().to(y.dtype).view(y.shape))
    return [y.detach(), *[t.grad for t in leaves if t is not None]]


def given(option, ndim, kernel_num):
    args = dict(padding=1) | OPTIONS[option]
    call = {n: args[n] for n in ('stride', 'padding', 'dilation', 'groups') if n in args}
    sizes = {n: args[n] for n in ('kernel', 'out_channels', 'batch', 'groups') if n in args}
    return problem(ndim, kernel_num, **sizes), call


# Each option in two dimensions, some in one and three, and each number of dimensions with both.
CASES = [
    (option, ndim, ('one', 'many')[(i + ndim) % 2])
    for ndim, options in ((2, OPTIONS), (1, EVERYWHERE), (3, EVERYWHERE))
    for i, option in enumerate(options)
]


@pytest.mark.parametrize('name', [*FAST, 'auto'])
@pytest.mark.parametrize(('option', 'ndim', 'blocks'), CASES)
def test_equals_the_formula(monkeypatch, name, option, ndim, blocks):
    if blocks == 'many':
        monkeypatch.setattr(cpu_grouped_conv, 'BLOCK_BYTES', 1000)
        monkeypatch.setattr(cpu_grouped_conv, 'LEAST_PATCHED_BYTES', 0)
        monkeypatch.setattr(cpu_im2col, 'BLOCK_BYTES', 1000)
        monkeypatch.setattr(cpu_im2col, 'SINGLE_SAMPLE_BLOCK_BYTES', 1000)
    for kernel_num in (1,) if name == 'cpu_im2col_single_kernel' else (1, 3):
        inputs, call = given(option, ndim, kernel_num)
        expected = outputs_and_gradients(*inputs, **call, strategy='reference')
        actual = outputs_and_gradients(*inputs, **call, strategy=name)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            y = odconv(*inputs, **call, strategy=name)
        torch.testing.assert_close(y, expected[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name', ['cpu_grouped_conv', 'cpu_im2col'])
@pytest.mark.parametrize('threads', [1, 2])
def test_a_single_sample_and_a_large_bank(name, threads):
    x, bank = torch.randn(1, 1024, 2, 2, dtype=DTYPE), torch.randn(3, 512, 1024, 1, 1, dtype=DTYPE)
    attentions = Attentions(
        torch.rand(1, 1024, dtype=DTYPE), torch.rand(1, 512, dtype=DTYPE), None, torch.rand(1, 3)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = odconv(x, bank, attentions, strategy=name)
    finally:
        torch.set_num_threads(before)
    expected = odconv(x, bank, attentions, strategy='reference')
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name', FAST)
def test_zero_attentions_have_gradients(name):
    x, bank, attentions = problem(kernel_num=1)
    zeros = Attentions(*[None if a is None else torch.zeros_like(a) for a in attentions])
    expected = outputs_and_gradients(x, bank, zeros, padding=1, strategy='reference')
    torch.testing.assert_close(
        outputs_and_gradients(x, bank, zeros, padding=1, strategy=name), expected
    )


@pytest.mark.parametrize('name', FAST)
@pytest.mark.parametrize('memory', ['channels_last', 'every_second'])
def test_takes_any_memory_layout(name, memory):
    x, bank, attentions = problem(kernel_num=1)
    expected = odconv(x, bank, attentions, padding=1, strategy='reference')
    if memory == 'channels_last':
        x = x.contiguous(memory_format=torch.channels_last)
    else:
        x = torch.stack([x, -x], dim=-1)[..., 0]
    torch.testing.assert_close(odconv(x, bank, attentions, padding=1, strategy=name), expected)


@pytest.mark.parametrize('name', [*FAST, 'auto'])
@pytest.mark.parametrize(
    ('absent', 'kernel', 'size'),
    [
        (absent, *(((1, None), (3, None), (3, 1))[i % 3]))
        for i, absent in enumerate([*itertools.product([True, False], repeat=4)] * 2)
    ],
)
def test_an_absent_attention_is_1_everywhere(name, absent, kernel, size):
    kernel_num = 1 if absent[3] or name == 'cpu_im2col_single_kernel' else 3
    x, bank, attentions = problem(kernel_num=kernel_num, kernel=kernel, channels=(24, 32))
    x = x if size is None else x[:, :, :size, :size]
    there = Attentions(*(None if a else t for a, t in zip(absent, attentions, strict=True)))
    ones = Attentions(
        *(
            t if t is None or t is a else torch.ones_like(t)
            for a, t in zip(there, attentions, strict=True)
        )
    )
    call = dict(padding=kernel // 2)
    expected = outputs_and_gradients(x, bank, ones, **call, strategy='reference')
    expected = [
        e
        for e, t in zip(
            expected, (x, x, bank, *[t for t in attentions if t is not None]), strict=True
        )
        if not any(t is a and b is None for a, b in zip(attentions, there, strict=True))
    ]
    actual = outputs_and_gradients(x, bank, there, **call, strategy=name)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name', FAST)
@pytest.mark.parametrize(
    'flags',
    [
        *(
            (x, bank, *(attentions,) * 4)
            for x, bank, attentions in itertools.product([True, False], repeat=3)
        ),
        *(tuple(i == j for j in range(6)) for i in range(2, 6)),
    ],
)
def test_computes_the_gradients_that_are_wanted(name, flags):
    kernel_num = 1 if name == 'cpu_im2col_single_kernel' else 3
    x, bank, attentions = problem(kernel_num=kernel_num)
    results = []
    for strategy in ('reference', name):
        leaves = [
            None if t is None else t.clone().requires_grad_(flag)
            for t, flag in zip((x, bank, *attentions), flags, strict=True)
        ]
        y = odconv(leaves[0], leaves[1], Attentions(*leaves[2:]), padding=1, strategy=strategy)
        if y.requires_grad:
            y.square().sum().backward()
        results.append([None if t is None else t.grad for t in leaves])
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('name', FAST)
def test_second_derivatives(name):
    x, bank, attentions = problem(kernel_num=1, kernel=1, batch=2)
    inputs = [t for t in (x[..., :2, :2], bank, *attentions) if t is not None]

    def function(x, bank, channel, filter_):
        return odconv(x, bank, Attentions(channel, filter_), strategy=name)

    inputs = [t.clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize('name', FAST)
def test_autocast_gives_what_a_convolution_gives(name):
    x, bank, attentions = problem(kernel_num=1, dtype=torch.float32)
    expected = outputs_and_gradients(x, bank, attentions, padding=1, strategy='reference')
    with torch.autocast('cpu', dtype=torch.bfloat16):
        actual = outputs_and_gradients(x, bank, attentions, padding=1, strategy=name)
    assert actual[0].dtype == torch.bfloat16
    for low, full in zip(actual, expected, strict=True):
        error = (low.float() - full).abs().max() / full.abs().max()
        assert error < 0.03


def test_choices_can_be_looked_at():
    layer = ODConv2d(4, 6, 3, kernel_num=2, strategy='cpu_im2col')
    x = torch.randn(2, 4, 5, 5)
    with record_strategies() as choices:
        layer(x)
        layer.strategy = 'auto'
        with torch.no_grad():
            layer(x[:1])
    layer(x)
    assert choices[0] == ((2, 4, 5, 5), (2, 6, 4, 3, 3), True, 'cpu_im2col')
    assert choices[1][:3] == ((1, 4, 5, 5), (2, 6, 4, 3, 3), False)
    assert choices[1].strategy in STRATEGIES
    assert len(choices) == 2


def test_an_unknown_strategy_is_named():
    with pytest.raises(ValueError, match=r"one of .*'cpu_grouped_conv'.* got 'fastest'"):
        odconv(*problem(), strategy='fastest')
    with pytest.raises(ValueError, match="got 'fastest'"):
        ODConv2d(4, 4, 3, strategy='fastest')


def test_a_single_kernel_implementation_refuses_several():
    with pytest.raises(ValueError, match='kernel_num=3'):
        odconv(*problem(kernel_num=3), strategy='cpu_im2col_single_kernel')
    with pytest.raises(ValueError, match='kernel_num=4'):
        ODConv2d(4, 4, 3, strategy='cpu_im2col_single_kernel')


@pytest.mark.parametrize('kernel_num', [1, 4])
@pytest.mark.parametrize('backbone', ['resnet', 'mobilenet'])
def test_keeps_hardly_more_than_plain_convolutions(kernel_num, backbone):
    from mmdet.models.backbones import MobileNetV2, ResNet

    if backbone == 'resnet':
        plain = ResNet(50, norm_eval=False)
        dynamic = ODResNet(50, norm_eval=False, kernel_num=kernel_num)
    else:
        plain, dynamic = MobileNetV2(), ODMobileNetV2(kernel_num=kernel_num)
    x = torch.randn(2, 3, 192, 192)
    kept, plainly_kept = TOOL.saved_bytes(dynamic, x), TOOL.saved_bytes(plain, x)
    assert 0 < kept <= 1.03 * plainly_kept


class LargestTensor(TorchDispatchMode):
    """Remembers the most entries of any tensor that an operation returns."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.entries = max(self.entries, value.numel())
        return result


@pytest.mark.parametrize('name', [*STRATEGIES, 'auto'])
@pytest.mark.parametrize('kernel', [1, 3])
def test_no_kernel_of_the_bank_is_copied_for_each_sample(name, kernel):
    batch, kernel_num, channels = 8, 1 if name == 'cpu_im2col_single_kernel' else 4, 64
    layer = ODConv2d(
        channels, channels, kernel, padding=kernel // 2, kernel_num=kernel_num, strategy=name
    )
    x = torch.randn(batch, channels, 4, 4, requires_grad=True)
    with LargestTensor() as largest:
        layer(x).sum().backward()
    assert largest.entries < batch * max(kernel_num, 2) * channels * channels * kernel**2
