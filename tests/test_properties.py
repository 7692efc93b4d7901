"""What holds for every layer and network, tried with options and inputs drawn by chance.

The number of examples is that of hypothesis's profile: 200 in the suite, always the same ones,
3,000 new ones with ``HYPOTHESIS_PROFILE=fuzz`` (``make fuzz``).
"""

import copy
import pickle

import pytest
import torch
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st
from safetensors.torch import load_model, save_model

from mmdet_odconv import ODMobileNetV2, ODResNet, ODResNeXt, set_temperature
from mmdet_odconv.functional import STRATEGIES
from tests.reference import randomise, reference_forward
from tests.test_layers.test_odconv import LAYERS, PLAIN
from tests.tiny_training import InChild, assert_equal_bit_for_bit, runner, weights_of

# Of the profile's number of examples, for tests that take longer.
FEW = max(settings().max_examples // 40, 5)
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}
pytestmark = pytest.mark.filterwarnings('ignore:The BatchNorm in an ODConv')


@st.composite
def layers(draw, strategies=(*STRATEGIES, 'auto')):
    """A layer with random weights in a random mode, and an input for it."""
    ndim = draw(st.integers(1, 3))

    def each(least, most):
        return tuple(draw(st.integers(least, most)) for _ in range(ndim))

    kernel_size, dilation = each(1, 7 if ndim < 3 else 4), each(1, 3)
    mode = draw(st.sampled_from(['zeros', 'zeros', 'reflect', 'replicate', 'circular']))
    padding = draw(st.sampled_from([*['int'] * 3, 'same', 'valid']))
    stride = (1,) * ndim if padding == 'same' else each(1, 3)
    width = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
    pads = {'same': [(w + 1) // 2 for w in width], 'valid': [0] * ndim}.get(padding)
    if pads is None:
        pads = padding = each(0, 3)
    # What the convolution, and the mode of its padding, need at least.
    least = [1 if padding == 'same' else w + 1 - 2 * p for w, p in zip(width, pads, strict=True)]
    if mode in ('reflect', 'circular'):
        least = [max(n, p + (mode == 'reflect')) for n, p in zip(least, pads, strict=True)]
    size = [max(n, 1) + draw(st.integers(0, 3)) for n in least]
    groups = draw(st.integers(1, 4))
    channels = [groups * draw(st.sampled_from([1, 1, 2, 3])) for _ in range(2)]
    strategy = draw(st.sampled_from(strategies))
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float32]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    layer = LAYERS[ndim](
        *channels,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        draw(st.booleans()),
        mode,
        dtype=dtype,
        kernel_num=1 if strategy.endswith('single_kernel') else draw(st.integers(1, 8)),
        reduction=draw(st.sampled_from([1 / 16, 0.3, 1.0, 2.0])),
        min_attention_channels=draw(st.integers(1, 16)),
        temperature=draw(st.floats(0.7, 30.0)),
        norm_cfg=draw(st.sampled_from([None, dict(type='BN'), dict(type='LN')])),
        strategy=strategy,
    )
    randomise(layer)
    x = torch.randn(draw(st.integers(0, 5)), channels[0], *size, dtype=dtype)
    x = draw(layouts(x, channels=1))
    layer.weight.data = draw(layouts(layer.weight.data, channels=2))
    return layer.train(draw(st.booleans())), x


@st.composite
def layouts(draw, x, channels):
    """The same values with another order in memory; ``channels`` is the dimension of these."""
    layout = draw(st.sampled_from(['contiguous', 'channels last', 'any order', 'gaps']))
    if layout == 'gaps':
        return torch.stack([x, -x], dim=-1)[..., 0]
    order = list(range(x.dim()))
    if layout == 'channels last':
        order.append(order.pop(channels))
    elif layout == 'any order':
        order = draw(st.permutations(order))
    return x.permute(order).contiguous().permute([order.index(dim) for dim in range(x.dim())])


def output_and_gradients(layer, forward, x):
    """What ``forward`` gives, and the gradients of the input and of the layer's parameters."""
    layer.zero_grad()
    leaf = x.detach().requires_grad_()  # in the layout that x has
    statistics = copy.deepcopy(dict(layer.named_buffers()))
    y = forward(leaf)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    layer.load_state_dict(statistics, strict=False)
    return [y.detach(), leaf.grad, *[p.grad for p in layer.parameters()]]


def check(layer, forward, x):
    """``forward`` gives what the slow formula gives in float64, gradients included."""
    try:
        actual = output_and_gradients(layer, forward, x)
    except ValueError as error:
        if 'cannot be used' not in str(error):
            raise
        reject()  # a strategy that was asked for and does not do this
    if len(x) == 0:
        assert all(not g.any() for g in actual[1:])
        return
    wide = copy.deepcopy(layer).double()
    expected = output_and_gradients(wide, lambda leaf: reference_forward(wide, leaf), x.double())
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == x.dtype
        torch.testing.assert_close(
            a.double(), e, rtol=0, atol=TOLERANCE[x.dtype] * max(e.abs().max().item(), 1)
        )


@settings(suppress_health_check=list(HealthCheck))
@given(layers())
def test_any_options_equal_the_formula(case):
    layer, x = case
    check(layer, layer, x)


@settings(suppress_health_check=list(HealthCheck), max_examples=FEW)
@given(layers())
def test_any_options_equal_the_formula_when_compiled(case):
    layer, x = case
    assume(len(x) > 0)
    torch.compiler.reset()
    check(layer, torch.compile(layer, backend='aot_eager'), x)


@settings(suppress_health_check=list(HealthCheck), max_examples=FEW)
@given(layers(strategies=['auto']), st.randoms(use_true_random=False))
def test_layers_have_the_shapes_of_plain_convolutions(case, chance):
    layer, x = case
    plain = PLAIN[layer.ndim](
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        padding_mode=layer.padding_mode,
        dtype=x.dtype,
    )
    assert layer(x).shape == plain(x).shape


NETWORKS = {
    'resnet': lambda: ODResNet(depth=18, base_channels=4),
    'resnext': lambda: ODResNeXt(depth=50, base_channels=4, groups=2, base_width=8),
    'mobilenet_v2': lambda: ODMobileNetV2(widen_factor=0.25),
}


@pytest.fixture(scope='module', params=NETWORKS)
def network(request):
    """A whole backbone in float64, in eval mode, no weight of which is a 0 or 1 by its start."""
    torch.manual_seed(0)
    model = NETWORKS[request.param]().double()
    model.init_weights()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or '.attention.' in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    set_temperature(model, 3.0)
    model.eval()
    return model


def assert_close(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-8 * e.abs().max().item())


class TestWholeNetworks:
    @settings(suppress_health_check=list(HealthCheck), max_examples=FEW)
    @given(order=st.permutations(range(5)), training=st.booleans())
    def test_another_order_of_the_batch_gives_another_order_of_the_output(
        self, network, order, training
    ):
        model = copy.deepcopy(network)
        model.train(training)
        x = torch.randn(5, 3, 32, 48, dtype=torch.float64)
        assert_close(model(x[order]), [y[order] for y in model(x)])

    @settings(suppress_health_check=list(HealthCheck), max_examples=FEW)
    @given(batch=st.integers(1, 4), height=st.integers(1, 40), width=st.integers(1, 40))
    def test_images_at_once_are_as_one_by_one(self, network, batch, height, width):
        x = torch.randn(batch, 3, height, width, dtype=torch.float64)
        one_by_one = [network(sample[None]) for sample in x]
        assert_close(network(x), [torch.cat(level) for level in zip(*one_by_one, strict=True)])

    @pytest.mark.parametrize('way', ['state dict', 'deepcopy', 'pickle', 'safetensors', 'file'])
    def test_a_copy_computes_the_same_bits(self, network, tmp_path, way):
        fresh = copy.deepcopy(network)
        randomise(fresh)
        set_temperature(fresh, 1.0)
        if way == 'state dict':
            fresh.load_state_dict(network.state_dict())
        elif way == 'file':
            torch.save(network.state_dict(), tmp_path / 'weights.pth')
            fresh.load_state_dict(torch.load(tmp_path / 'weights.pth'))
        elif way == 'safetensors':
            save_model(network, str(tmp_path / 'weights.safetensors'))
            load_model(fresh, str(tmp_path / 'weights.safetensors'))
        else:
            fresh = copy.deepcopy(network) if way == 'deepcopy' else dumped(network)
        x = torch.randn(2, 3, 32, 48, dtype=torch.float64)
        for actual, expected in zip(fresh(x), network(x), strict=True):
            assert torch.equal(actual, expected)

    def test_two_deterministic_trainings_have_the_same_bits(self, network):
        results = []
        for _ in range(2):
            model = copy.deepcopy(network)
            model.train()
            torch.manual_seed(1)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
            torch.use_deterministic_algorithms(True)
            try:
                for _ in range(2):
                    optimizer.zero_grad()
                    outputs = model(torch.randn(2, 3, 32, 48, dtype=torch.float64))
                    sum(y.square().mean() for y in outputs).backward()
                    optimizer.step()
            finally:
                torch.use_deterministic_algorithms(False)
            results.append(model.state_dict())
        assert_equal_bit_for_bit(*results)


def dumped(model):
    return pickle.loads(pickle.dumps(model))


def train(work_dir):
    runner(work_dir, epochs=2, randomness=dict(deterministic=True)).train()


def test_two_deterministic_runs_have_the_same_bits(tmp_path):
    for name in 'ab':
        assert InChild(train, tmp_path / name).wait() == 0
    states = [weights_of(tmp_path / name / 'epoch_2.pth') for name in 'ab']
    assert_equal_bit_for_bit(*states)
