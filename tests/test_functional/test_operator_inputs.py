"""The operator with inputs in every layout, type and mode, and under PyTorch's transforms."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from mmdet_odconv.functional import STRATEGIES, Attentions, odconv, odconv_formula
from mmdet_odconv.functional.implementation import resolve_geometry
from tests.test_functional.test_operator import DTYPE, FAST, outputs_and_gradients, problem

CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def layouts(tensor):
    """The same values in other places of the memory."""
    yield 'transposed', tensor.transpose(0, -1).contiguous().transpose(0, -1)
    yield 'every_second', torch.stack([tensor, -tensor], dim=-1)[..., 0]
    yield (
        'reversed',
        tensor.permute(*reversed(range(tensor.dim())))
        .contiguous()
        .permute(*reversed(range(tensor.dim()))),
    )
    for ndim, memory_format in CHANNELS_LAST.items():
        if tensor.dim() == ndim + 2:
            yield 'channels_last', tensor.contiguous(memory_format=memory_format)


def leaves_in(layout, tensors):
    """Leaves of autograd in a layout, or contiguous where it is not for a tensor of this shape."""
    return [
        None if t is None else dict(layouts(t)).get(layout, t).detach().requires_grad_()
        for t in tensors
    ]


@pytest.mark.parametrize('name', [*STRATEGIES, 'auto'])
@pytest.mark.parametrize(
    ('layout', 'kernel', 'ndim'),
    [
        ('transposed', 1, 2),
        ('transposed', 3, 1),
        ('every_second', 1, 3),
        ('every_second', 3, 2),
        ('reversed', 1, 1),
        ('reversed', 3, 3),
        ('channels_last', 1, 2),
        ('channels_last', 3, 2),
        ('channels_last', 3, 3),
    ],
)
def test_any_layout_of_any_input(name, layout, kernel, ndim):
    kernel_num = 1 if name == 'cpu_im2col_single_kernel' else 3
    inputs = problem(ndim, kernel_num, kernel)
    call = dict(padding=kernel // 2)
    expected = outputs_and_gradients(*inputs, **call, strategy='reference')
    for changed in ('x', 'bank', 'attentions', 'all'):
        tensors = [inputs[0], inputs[1], *inputs[2]]
        other = leaves_in(layout, tensors)
        plain = [None if t is None else t.clone().requires_grad_() for t in tensors]
        used = [
            other[i] if changed in ('all', ('x', 'bank', 'attentions')[min(i, 2)]) else plain[i]
            for i in range(6)
        ]
        y = odconv(used[0], used[1], Attentions(*used[2:]), **call, strategy=name)
        y.backward(torch.arange(y.numel()).double().cos().view(y.shape))
        actual = [y.detach(), *[t.grad for t in used if t is not None]]
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name', [*FAST, 'auto'])
@pytest.mark.parametrize('ndim', [2, 3])
def test_the_memory_format_of_the_input_is_kept(name, ndim):
    x, bank, attentions = problem(ndim, 1)
    memory_format = CHANNELS_LAST[ndim]
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    y = odconv(x, bank, attentions, padding=1, strategy=name)
    assert y.is_contiguous(memory_format=memory_format)
    y.sum().backward()
    assert x.grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    'dtype',
    [torch.uint8, torch.int64, torch.bool, torch.half, torch.bfloat16, torch.double, torch.cfloat],
)
def test_refuses_the_input_types_that_a_convolution_refuses(dtype):
    x, bank, attentions = problem(dtype=torch.float32)
    x = x.to(dtype)
    with pytest.raises(RuntimeError):
        nn.functional.conv2d(x, bank[0])
    with pytest.raises(RuntimeError, match=rf'Input type \({dtype}\).* should be the same'):
        odconv(x, bank, attentions)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int64, torch.double])
def test_refuses_under_autocast_what_a_convolution_refuses_there(dtype):
    x, bank, attentions = problem(dtype=torch.float32)
    x = x.to(dtype)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        with pytest.raises(RuntimeError):
            nn.functional.conv2d(x, bank[0])
        with pytest.raises(RuntimeError, match='should be the same'):
            odconv(x, bank, attentions)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(x=torch.randn(3, 5, 6, 7, dtype=DTYPE)), r'shape \(3, 5, 6, 7\) does not fit'),
        (dict(groups=3), 'groups=3'),
        (dict(channel=torch.rand(2, 4, dtype=DTYPE)), r'channel attention must .* got \(2, 4\)'),
        (dict(filter=torch.rand(3, 5, dtype=DTYPE)), r'filter attention must .* got \(3, 5\)'),
        (dict(spatial=torch.rand(3, 4, dtype=DTYPE)), r'spatial attention must .* got \(3, 4\)'),
        (dict(kernel=torch.rand(3, 4, dtype=DTYPE)), r'kernel attention must .* got \(3, 4\)'),
        (dict(kernel=None), 'a bank of 3 kernels needs a kernel attention'),
        (dict(bias=torch.rand(1, dtype=DTYPE)), r'bias must have shape \(6,\), got \(1,\)'),
        (dict(stride=0), 'stride must be an int or 2 ints, each at least 1, got 0'),
        (dict(stride=(1, 1, 1)), r'stride must be .*got \(1, 1, 1\)'),
        (dict(dilation=0.5), 'dilation must be .*got 0.5'),
        (dict(padding=-1), 'padding must be .*at least 0, got -1'),
        (dict(padding='reflect'), "padding must be 'same', 'valid' or int.*got 'reflect'"),
        (dict(padding='same', stride=2), "padding='same' needs stride 1, got stride=2"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    x, bank, attentions = problem()
    change = dict(change)
    attentions = attentions._replace(
        **{name: change.pop(name) for name in Attentions._fields if name in change}
    )
    with pytest.raises(ValueError, match=message):
        odconv(change.pop('x', x), bank, attentions, **change)


@pytest.mark.parametrize('name', [*STRATEGIES, 'auto'])
def test_an_input_smaller_than_the_kernel_gets_the_words_of_a_convolution(name):
    x, bank, attentions = problem(kernel_num=1)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        odconv(x[..., :2, :2], bank, attentions, strategy=name)


def along_batch(attentions):
    """The dimension of each attention for vmap."""
    return Attentions(*[None if a is None else 0 for a in attentions])


def by_vmap(function, x, bank, attentions):
    return torch.vmap(function, in_dims=(0, None, along_batch(attentions)))(x, bank, attentions)


def one_by_one(function, x, bank, attentions):
    samples = range(len(x))
    at = lambda b: Attentions(*[None if a is None else a[b] for a in attentions])  # noqa: E731
    return torch.stack([function(x[b], bank, at(b)) for b in samples])


@pytest.mark.parametrize('name', [*STRATEGIES, 'auto'])
class TestTransforms:
    """Each transform of torch.func equals a loop, whatever implementation was asked for."""

    @pytest.fixture
    def problem(self, name):
        return problem(kernel_num=1 if name == 'cpu_im2col_single_kernel' else 2, batch=2)

    @pytest.fixture
    def single(self, name):
        def function(x, bank, attentions):
            batch = Attentions(*[None if a is None else a[None] for a in attentions])
            return odconv(x[None], bank, batch, padding=1, strategy=name)[0]

        return function

    def test_vmap(self, problem, single):
        torch.testing.assert_close(
            by_vmap(single, *problem), one_by_one(single, *problem), rtol=1e-10, atol=1e-10
        )

    def test_gradients_of_each_sample(self, problem, single):
        def loss(bank, x, attentions):
            return single(x, bank, attentions).square().sum()

        x, bank, attentions = problem
        actual = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, along_batch(attentions)))(
            bank, x, attentions
        )
        for b in range(len(x)):
            leaf = bank.clone().requires_grad_()
            own = Attentions(*[None if a is None else a[b] for a in attentions])
            expected = torch.autograd.grad(loss(leaf, x[b], own), leaf)[0]
            torch.testing.assert_close(actual[b], expected, rtol=1e-10, atol=1e-10)

    def test_jacobians(self, name, problem):
        x, bank, attentions = problem

        def function(bank):
            return odconv(
                x[:1, :, :3, :3],
                bank,
                Attentions(*[None if a is None else a[:1] for a in attentions]),
                strategy=name,
            )

        expected = torch.autograd.functional.jacobian(function, bank)
        for actual in (
            torch.func.jacrev(function)(bank),
            torch.func.jacfwd(function)(bank),
            torch.autograd.functional.jacobian(function, bank, vectorize=True),
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)

    def test_forward_mode(self, name, problem):
        x, bank, attentions = problem
        tangent = torch.randn_like(x)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, tangent)
            y = odconv(dual, bank, attentions, padding=1, strategy=name)
            actual = forward_ad.unpack_dual(y).tangent
        # The operator is linear in x.
        expected = odconv(tangent, bank, attentions, padding=1, strategy='reference')
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name', [*FAST, 'auto'])
def test_derivatives_where_the_attentions_are_functions_of_the_input(name):
    x, bank, _ = problem(kernel_num=1)

    def function(x, strategy=name):
        attentions = Attentions(x.mean((2, 3)).sigmoid(), None, None, None)
        return odconv(x, bank, attentions, strategy=strategy)

    def second(strategy):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, strategy).square().sum()
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaf)[0]

    torch.testing.assert_close(second(name), second('reference'), rtol=1e-10, atol=1e-10)
    small = x[:1, :, :3, :3]
    jacobians = [
        torch.autograd.functional.jacobian(function, small, vectorize=vectorize)
        for vectorize in (False, True)
    ]
    torch.testing.assert_close(*jacobians, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name', [*STRATEGIES, 'auto'])
class TestStateLeftBehind:
    """No call leaves anything that another one can see."""

    @pytest.fixture
    def problem(self, name):
        return problem(kernel_num=1 if name == 'cpu_im2col_single_kernel' else 2)

    def check(self, problem, name):
        torch.testing.assert_close(
            outputs_and_gradients(*problem, padding=1, strategy=name),
            outputs_and_gradients(*problem, padding=1, strategy='reference'),
        )

    def test_a_default_device_without_memory(self, name, problem):
        x, bank, attentions = problem
        bank.requires_grad_()
        grad = torch.ones(3, 6, 6, 7, dtype=DTYPE)
        torch.set_default_device('meta')
        try:
            odconv(x, bank, attentions, padding=1, strategy=name).backward(grad)
        finally:
            torch.set_default_device(None)
        self.check((x, bank.detach(), attentions), name)
        expected = bank.detach().requires_grad_()
        odconv(x, expected, attentions, padding=1, strategy='reference').backward(grad)
        torch.testing.assert_close(bank.grad, expected.grad)

    def test_meta_tensors(self, name, problem):
        x, bank, attentions = problem
        meta = Attentions(*[None if a is None else a.to('meta') for a in attentions])
        y = odconv(x.to('meta'), bank.to('meta'), meta, padding=1, strategy=name)
        assert y.is_meta
        assert y.shape == (3, 6, 6, 7)
        self.check(problem, name)

    @pytest.mark.parametrize('real_inputs', [True, False])
    def test_fake_tensors(self, name, problem, real_inputs):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            x, bank, attentions = problem
            if not real_inputs:
                fake = mode.from_tensor
                x, bank = fake(x), fake(bank)
                attentions = Attentions(*[None if a is None else fake(a) for a in attentions])
            assert odconv(x, bank, attentions, padding=1, strategy=name).shape == (3, 6, 6, 7)
        self.check(problem, name)

    def test_inference_mode(self, name, problem):
        with torch.inference_mode():
            odconv(*problem, padding=1, strategy=name)
        self.check(problem, name)

    def test_outputs_are_memory_of_their_own(self, name, problem):
        with torch.no_grad():
            first = odconv(*problem, padding=1, strategy=name)
            copy = first.clone()
            odconv(problem[0] * 2, *problem[1:], padding=1, strategy=name)
        assert torch.equal(first, copy)


@pytest.mark.parametrize('name', [*STRATEGIES, 'auto'])
@pytest.mark.parametrize('grad', [True, False])
def test_the_bias_is_added_and_has_a_gradient(name, grad):
    x, bank, attentions = problem(kernel_num=1)
    bias = torch.randn(6, dtype=DTYPE, requires_grad=grad)
    y = odconv(x, bank, attentions, bias, padding=1, strategy=name)
    plain = odconv(x, bank, attentions, padding=1, strategy=name)
    torch.testing.assert_close(y, plain + bias[:, None, None])
    if grad:
        weights = torch.randn_like(y)
        (y * weights).sum().backward()
        torch.testing.assert_close(bias.grad, weights.sum((0, 2, 3)))


@pytest.mark.parametrize('stride', [1, 2])
def test_the_formula_takes_resolved_geometry(stride):
    x, bank, attentions = problem()
    geometry, _ = resolve_geometry((3, 3), stride, 1, 1, 1)
    y = odconv_formula(x, bank, attentions, None, geometry)
    torch.testing.assert_close(y, odconv(x, bank, attentions, stride=stride, padding=1))
