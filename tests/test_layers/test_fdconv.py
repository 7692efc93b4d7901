"""FDConv2d against a slow formula, and what users do with a convolution."""

import copy
import math

import pytest
import torch
from mmcv.cnn import ConvModule, build_conv_layer
from mmdet.models.backbones import ResNet
from torch import nn
from torch.autograd import gradcheck

from mmdet_odconv import FDConv2d, convert_to_odconv, fuse_odconv_bn
from mmdet_odconv.functional import fourier_kernels
from mmdet_odconv.functional.fourier import frequency_groups
from tests.reference import randomise, reference_norm

CASES = {
    'plain': {},
    'pointwise': dict(kernel_size=1, padding=0),
    '5x5, dilated': dict(kernel_size=5, padding=4, dilation=2),
    'not square, strided': dict(kernel_size=(3, 1), stride=2, padding=0),
    'channels that K does not divide': dict(in_channels=5, out_channels=7, kernel_num=4),
    'grouped': dict(groups=2),
    'depthwise': dict(in_channels=6, groups=6),
    'one channel': dict(in_channels=1, out_channels=1),
    'no bias': dict(bias=False),
    'padding mode': dict(padding_mode='reflect'),
    'same padding': dict(kernel_size=2, padding='same', padding_mode='circular'),
    'one kernel': dict(kernel_num=1),
    'layer norm': dict(norm_cfg=dict(type='LN')),
    'group norm': dict(norm_cfg=dict(type='GN', num_groups=4)),
    'no norm': dict(norm_cfg=None),
    'no local factors': dict(local=False),
    'no bands': dict(bands=()),
    'other bands': dict(bands=(2, 3)),
    'filter and kernel attention': dict(attentions=('filter', 'kernel')),
    'no attention': dict(attentions=(), kernel_num=1, local=False, bands=()),
}


def layer(**options):
    args = dict(in_channels=4, out_channels=6, kernel_size=3, padding=1, kernel_num=5) | options
    return FDConv2d(**args)


def randomised(model):
    randomise(model)
    return model


def image(model, batch=3, size=9):
    return torch.randn(batch, model.in_channels, size, size)


def slow_forward(model, x):
    """What the layer must give, sample by sample, in the order of the description."""
    a, t = model.attention, model.attention.temperature
    pooled = x.mean((2, 3))
    if a.fc is not None:
        h = pooled @ a.fc.weight.flatten(1).t()
        if isinstance(a.bn, nn.GroupNorm):
            parts = h.view(len(h), a.bn.num_groups, -1)
            mean, var = parts.mean(2, keepdim=True), parts.var(2, keepdim=True, unbiased=False)
            h = ((parts - mean) / (var + a.bn.eps).sqrt()).view_as(h)
            h = a.bn.weight * h + a.bn.bias
            h = a.act_scale * h.relu() ** 2 + a.act_bias
        else:
            h = a.act_scale * reference_norm(a.bn, h).relu() ** 2 + a.act_bias
    outputs = []
    for b, sample in enumerate(x):

        def factor(head, b=b):
            return 2 * torch.sigmoid((head.weight.flatten(1) @ h[b] + head.bias) / t)

        # FDW: every group of frequencies is transformed by itself.
        c_out, reads, k_h, k_w = shape = model.kernel_shape
        rows, columns = c_out // model.groups * k_h, reads * k_w
        scale = max(min(c_out // model.groups, reads) // 2, 1)
        pi = factor(a.kernel_fc) if a.kernel_fc is not None else torch.ones(1, dtype=x.dtype)
        groups = frequency_groups(rows, columns, model.kernel_num)
        kernel = torch.zeros(shape, dtype=x.dtype)
        for j in range(model.kernel_num):
            part = torch.view_as_complex(model.weight.detach()) * (groups == j)
            matrices = torch.fft.irfft2(part, s=(rows, columns)) * scale
            w = matrices.reshape(model.groups, c_out // model.groups, k_h, reads, k_w)
            kernel = kernel + pi[j] * w.transpose(2, 3).reshape(shape)
        # KSM.
        if a.spatial_fc is not None:
            kernel = kernel * factor(a.spatial_fc).view(k_h, k_w)
        if a.filter_fc is not None:
            kernel = kernel * factor(a.filter_fc).view(-1, 1, 1, 1)
        if model.local is not None:
            u = model.local.norm(pooled[b])
            conv1d = nn.functional.conv1d(
                u.view(1, 1, -1), model.local.weight, padding=model.local.weight.shape[2] // 2
            )
            whole = conv1d.view(c_out, k_h, k_w, model.in_channels).permute(0, 3, 1, 2)
            of_group = [
                whole[o, o // (c_out // model.groups) * reads :][:reads] for o in range(c_out)
            ]
            kernel = kernel * 2 * torch.sigmoid(torch.stack(of_group))
        # FBM, by masks on the spectrum.
        if model.bands is not None:
            gates = (
                nn.functional.conv2d(sample[None], model.bands.weight, model.bands.bias, padding=1)[
                    0
                ].sigmoid()
                * 2
            )
            u, v = (torch.fft.fftfreq(n, dtype=x.dtype).abs() for n in sample.shape[1:])
            radius = torch.maximum(u[:, None], v)
            lows = [
                torch.fft.ifft2(torch.fft.fft2(sample) * (radius < 0.5 / f)).real
                for f in model.bands.factors
            ]
            parts = [p - q for p, q in zip([sample, *lows], lows, strict=False)]
            sample = lows[-1] + sum(g * p for g, p in zip(gates, parts, strict=True))
        if a.channel_fc is not None:
            sample = factor(a.channel_fc).view(-1, 1, 1) * sample
        outputs.append(plain_conv(model, kernel, sample[None])[0])
    return torch.stack(outputs)


def plain_conv(model, kernel, x):
    conv = nn.Conv2d(
        model.in_channels,
        model.out_channels,
        model.kernel_size,
        model.stride,
        model.padding,
        model.dilation,
        model.groups,
        model.bias is not None,
        model.padding_mode,
        dtype=x.dtype,
    )
    conv.weight.data = kernel.detach()
    if model.bias is not None:
        conv.bias.data = model.bias.detach()
    return conv(x)


@pytest.fixture(params=['whole kernels', 'kernels in parts'])
def form(request, monkeypatch):
    """Small layers computed with whole kernels, as they are by themselves, or as large ones are."""
    if request.param == 'kernels in parts':
        monkeypatch.setattr(fourier_kernels, 'LEAST_ENTRIES', 1)
        monkeypatch.setattr(fourier_kernels, 'MOST_POSITIONS', 10**6)
        monkeypatch.setattr(fourier_kernels, 'BLOCK_ENTRIES', 100)
    return request.param


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('training', [True, False])
def test_output_is_that_of_the_slow_formula(case, training, form):
    model = randomised(layer(**CASES[case]).double()).train(training)
    x = image(model).double()
    with torch.no_grad():
        torch.testing.assert_close(model(x), slow_forward(model, x))


@pytest.mark.parametrize(
    'case', ['plain', 'grouped', 'depthwise', 'pointwise', 'not square, strided', 'no norm']
)
def test_gradients(case, form):
    model = randomised(layer(**CASES[case] | dict(kernel_num=3)).double()).eval()
    x = image(model, 2, 4).double().requires_grad_()
    names = [name for name, _ in model.named_parameters()]

    def function(x, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    assert gradcheck(function, (x, *model.parameters()), fast_mode=True)


@pytest.mark.parametrize('case', CASES)
def test_static_weights_keep_their_function(case, form):
    model = randomised(layer(**CASES[case]))
    x = image(model)
    torch.manual_seed(1)
    plain = plain_conv(model, torch.randn(model.kernel_shape), x)  # for the generator alone
    conv = nn.Conv2d(
        model.in_channels,
        model.out_channels,
        model.kernel_size,
        model.stride,
        model.padding,
        model.dilation,
        model.groups,
        model.bias is not None,
        model.padding_mode,
    )
    result = model.load_state_dict(conv.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    expected = conv(x)
    assert plain.shape == expected.shape
    for mode in (True, False):
        model.train(mode)
        difference = (model(x) - expected).abs().max() / expected.abs().max()
        assert difference < 1e-5


@pytest.mark.parametrize('case', [c for c in CASES if c not in ('one kernel', 'no attention')])
def test_both_forms_give_the_same_gradients(case, monkeypatch):
    model = randomised(layer(**CASES[case])).eval()
    x, gradients = image(model), {}
    for least in (1, 10**9):
        monkeypatch.setattr(fourier_kernels, 'LEAST_ENTRIES', least)
        monkeypatch.setattr(fourier_kernels, 'MOST_POSITIONS', 10**6)
        inputs = [x.clone().requires_grad_(), *model.parameters()]
        y = model(inputs[0])
        gradients[least] = torch.autograd.grad(y.square().sum(), inputs)
    for a, b in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


def test_a_second_derivative(form):
    model = randomised(layer().double()).eval()
    x = image(model, 2, 4).double().requires_grad_()
    assert torch.autograd.gradgradcheck(model, x, fast_mode=True)


def test_frozen_parts_get_no_gradient(form):
    model = randomised(layer())
    model.weight.requires_grad_(False)
    model(image(model)).sum().backward()
    assert model.weight.grad is None
    assert model.attention.kernel_fc.weight.grad is not None


def test_one_image_trains():
    model = layer()
    with pytest.warns(UserWarning, match='a single sample'):
        model(image(model, 1)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_every_parameter_gets_a_gradient_and_the_second_step_moves_all():
    model = layer(norm_cfg=dict(type='LN'))
    x, target = image(model), torch.randn(3, 6, 9, 9)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    assert [n for n, v in model.state_dict().items() if torch.equal(v, before[n])] == [
        name for name in before if 'temperature' in name
    ]


def test_empty_and_unbatched_inputs():
    model = layer().eval()
    assert model(image(model, 0)).shape == (0, 6, 9, 9)
    x = image(model, 1)
    torch.testing.assert_close(model(x[0]), model(x)[0])
    with pytest.raises(ValueError, match='expects 4 input channels'):
        model(torch.randn(1, 3, 9, 9))


def test_the_kernel_number_is_at_most_that_of_the_frequencies():
    assert layer(kernel_num=10**6).kernel_num == 18 * 7
    assert layer(in_channels=4, out_channels=4, groups=4, kernel_num=64).kernel_num == 6


@pytest.mark.parametrize(
    'argument', [dict(kernel_num=0), dict(bands=(4, 2)), dict(bands=(0,)), dict(bands=(2, 2))]
)
def test_bad_arguments_are_named(argument):
    with pytest.raises(ValueError, match=next(iter(argument))):
        layer(**argument)


def test_mixed_precision():
    model = randomised(layer(norm_cfg=dict(type='LN')))
    x = image(model).requires_grad_()
    expected = model(x)
    with torch.autocast('cpu', torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert (y - expected).abs().max() < 0.05 * expected.abs().max()
    y.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in model.parameters())
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_no_more_is_kept_for_the_backward_pass_than_by_odconv():
    """x once, and what is small: neither kernels nor the bands of x."""
    model = layer(in_channels=16, out_channels=16)
    x = image(model, 4, 32).requires_grad_()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    rest = sum(size for pointer, size in kept.items() if pointer not in own)
    gates = 4 * 3 * 32 * 32 * 4
    assert rest < x.numel() * 4 + 4 * gates


def test_channels_last_and_a_memory_format_for_the_module():
    model = randomised(layer(norm_cfg=dict(type='LN')))
    x = image(model)
    expected = model(x)
    moved = copy.deepcopy(model).to(memory_format=torch.channels_last)
    y = moved(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)


def test_copies_and_files_and_the_meta_device(tmp_path):
    model = randomised(layer(norm_cfg=dict(type='LN')))
    x = image(model)
    expected = model(x)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    state = torch.load(tmp_path / 'weights.pth', weights_only=True)
    assert 'frequency_group' not in state
    for assign in (False, True):
        with torch.device('meta'):
            empty = layer(norm_cfg=dict(type='LN'))
        if not assign:
            empty.to_empty(device='cpu')
        empty.load_state_dict(state, assign=assign)
        torch.testing.assert_close(empty(x), expected)


def test_compiled_code_gives_the_same():
    model = randomised(layer(norm_cfg=dict(type='LN')))
    x = image(model)
    expected = model(x)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_in_modules_of_openmmlab():
    conv = build_conv_layer(dict(type='FDConv2d', kernel_num=8), 4, 6, 3, padding=1)
    assert isinstance(conv, FDConv2d)
    assert conv.kernel_num == 8
    module = ConvModule(4, 6, 3, conv_cfg=dict(type='FDConv2d'), norm_cfg=dict(type='BN'))
    assert module(torch.randn(2, 4, 8, 8)).shape == (2, 6, 6, 6)


def test_a_norm_behind_is_folded():
    torch.manual_seed(0)
    for options in ({}, dict(bias=False), dict(groups=4, out_channels=4)):
        model = layer(**options)
        block = nn.Sequential(model, nn.BatchNorm2d(model.out_channels)).eval()
        randomise(block)
        x = image(model)
        expected = block(x)
        fused = fuse_odconv_bn(copy.deepcopy(block))
        assert isinstance(fused[1], nn.Identity)
        torch.testing.assert_close(fused(x), expected)

    with pytest.raises(RuntimeError, match='fuse_odconv_bn'):
        nn.utils.fuse_conv_bn_eval(layer().eval(), nn.BatchNorm2d(6).eval())


def test_a_resnet_is_converted_and_costs_as_much_as_published():
    model = nn.Module()
    model.backbone = ResNet(50)
    model.eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model.backbone(x)
    report = convert_to_odconv(model, layer='FDConv2d')
    added = report.parameters_after - report.parameters_before
    assert math.isclose(added, 3.65e6, rel_tol=0.002)
    assert {type(b.conv2) for b in model.backbone.layer4} == {FDConv2d}
    for a, b in zip(model.backbone(x), expected, strict=True):
        assert (a - b).abs().max() / b.abs().max() < 1e-4
