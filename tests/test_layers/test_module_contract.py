"""What users do to any ``nn.Conv2d`` works with ODConv as well: hooks, pruning, files, wrappers."""

import copy

import pytest
import torch
from mmdet.models.layers import FrozenBatchNorm2d
from mmengine.optim import DefaultOptimWrapperConstructor
from safetensors.torch import load_model, save_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.func import functional_call, grad, vmap
from torch.nn.utils import fuse_conv_bn_eval, parametrizations, prune
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from mmdet_odconv import (
    CondConv2d,
    FDConv2d,
    ODConv1d,
    ODConv2d,
    ODConv3d,
    fuse_odconv_bn,
    set_temperature,
)
from mmdet_odconv.functional import STRATEGIES
from mmdet_odconv.training.optim import groups_by_parameter
from tests.reference import randomise

SUBMODULES = ['fc', 'bn', 'channel_fc', 'filter_fc', 'spatial_fc', 'kernel_fc']
STARTS = {
    'zero': {},
    'published': dict(attention_init='published'),
    'temperature': dict(temperature=7.0),
    'bias': dict(attention_bias=0.5),
    'layer_norm': dict(norm_cfg=dict(type='LN')),
}


NORMS = [
    dict(type='BN'),
    dict(type='LN'),
    dict(type='GN', num_groups=4),
    dict(type='CalibratedNorm'),
]


def layer(kind=ODConv2d, **options):
    args = dict(in_channels=4, out_channels=6, kernel_size=3, padding=1) | options
    return kind(**args)


def image(batch=3, dtype=torch.float32):
    return torch.randn(batch, 4, 6, 6, dtype=dtype)


def train_steps(model, x, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


class TestSubmodules:
    @pytest.mark.parametrize('name', SUBMODULES)
    def test_hooks_run(self, name):
        model = layer()
        calls = []
        module = getattr(model.attention, name)
        module.register_forward_pre_hook(lambda *_: calls.append('before'))
        module.register_forward_hook(lambda *_: calls.append('after'))
        module.register_full_backward_hook(lambda *_: calls.append('backward'))
        for mode in (True, False):
            calls.clear()
            model.train(mode)(image()).sum().backward()
            assert calls == ['before', 'after', 'backward']

    @pytest.mark.parametrize('name', [n for n in SUBMODULES if n != 'bn'])
    def test_a_pruned_submodule_trains(self, name):
        model = layer(attention_init='published')
        module = getattr(model.attention, name)
        prune.random_unstructured(module, 'weight', amount=0.5)
        before = module.weight_orig.detach().clone()
        train_steps(model, image())
        assert not torch.equal(module.weight_orig, before)
        assert not module.weight[module.weight_mask == 0].any()

    @pytest.mark.parametrize('name', [n for n in SUBMODULES if n != 'bn'])
    def test_a_parametrized_submodule_trains(self, name):
        model = layer(attention_init='published')
        expected = model.eval()(image())
        module = parametrizations.weight_norm(getattr(model.attention, name))
        torch.manual_seed(0)
        assert model(image()).shape == expected.shape
        before = copy.deepcopy(list(module.parameters()))
        train_steps(model.train(), image())
        assert any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))

    def test_a_frozen_norm_takes_the_place_of_the_norm(self):
        model = layer(attention_init='published').eval()
        randomise(model)
        x = image()
        expected = model(x)
        norm = FrozenBatchNorm2d(model.attention.bn.num_features)
        norm.load_state_dict(model.attention.bn.state_dict(), strict=False)
        model.attention.bn = norm
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        train_steps(model.train(), x)


def by_parents_first(model):
    for module in model.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()


def by_children_first(model):
    for module in reversed(list(model.modules())):
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()


def by_layer(model):
    for module in model.modules():
        if isinstance(module, ODConv2d):
            module.reset_parameters()


def initial_state(model):
    """What the constructor decides without chance: all entries but the random weights."""
    state = model.state_dict()
    return {
        name: value
        for name, value in state.items()
        if not name.endswith(('weight', 'bias')) or not value.any() or value.unique().numel() == 1
    }


@pytest.mark.parametrize('start', STARTS)
class TestInitialisation:
    def check(self, model, start):
        expected = initial_state(nn.Sequential(layer(**STARTS[start])))
        assert len(expected) > 6
        actual = model.state_dict()
        for name, value in expected.items():
            assert torch.equal(actual[name], value), name
        # What is random must have been drawn, with the spread that the constructor gives.
        fresh = nn.Sequential(layer(**STARTS[start])).state_dict()
        for name in actual.keys() - expected.keys():
            assert actual[name].std() == pytest.approx(fresh[name].std(), rel=0.5), name

    @pytest.mark.parametrize('reset', [by_parents_first, by_children_first, by_layer])
    @pytest.mark.parametrize('made', ['in_place', 'to_empty', 'module_by_module'])
    def test_any_order_gives_what_the_constructor_gives(self, start, reset, made):
        if made == 'in_place':
            model = nn.Sequential(layer(**STARTS[start]))
            randomise(model)
            set_temperature(model, 3.0)
        else:
            model = nn.Sequential(layer(**STARTS[start], device='meta'))
            assert all(t.is_meta for t in model.state_dict().values())
        if made == 'to_empty':
            model.to_empty(device='cpu')
        if made == 'module_by_module':  # as FSDP does, each module with its own parameters only
            for module in model.modules():
                module.to_empty(device='cpu', recurse=False)
        reset(model)
        self.check(model, start)

    def test_static_weights_assigned_on_meta(self, start):
        plain = nn.Conv2d(4, 6, 3, padding=1)
        with torch.device('meta'):
            model = layer(**STARTS[start])
        model.load_state_dict(plain.state_dict(), assign=True)
        assert not any(t.is_meta for t in model.state_dict().values())
        x = image()
        torch.testing.assert_close(model.eval()(x), plain(x), rtol=1e-4, atol=1e-5)
        assert model.temperature == STARTS[start].get('temperature', 1.0)

    @pytest.mark.parametrize('device', ['meta', 'cpu'])
    def test_static_weights_after_to_empty(self, start, device):
        plain = nn.Conv2d(4, 6, 3, padding=1)
        model = layer(**STARTS[start], device=device).to_empty(device='cpu')
        if device == 'cpu':  # what new memory often holds
            for tensor in model.state_dict().values():
                tensor.zero_()
        model.load_state_dict(plain.state_dict())
        assert model.attention.fc.weight.std() > 0.05
        x = image()
        torch.testing.assert_close(model.eval()(x), plain(x), rtol=1e-4, atol=1e-5)
        assert model.temperature == STARTS[start].get('temperature', 1.0)

    def test_weights_without_a_temperature_assigned_on_meta(self, start):
        whole = layer(**STARTS[start]).eval()
        published = whole.state_dict()
        del published['attention.temperature']
        with torch.device('meta'):
            model = layer(**STARTS[start]).eval()
            model.load_state_dict(published, assign=True)
        x = image()
        torch.testing.assert_close(model(x), whole(x))


def by_class_name(module):
    """The customary function for ``model.apply``."""
    name = type(module).__name__
    if 'Conv' in name or 'Linear' in name:
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif 'BatchNorm' in name:
        nn.init.normal_(module.weight, 1.0, 0.02)


def test_an_initialisation_by_class_name_finds_the_bank_and_not_the_heads():
    model = nn.Sequential(layer(), layer(in_channels=6))
    before = copy.deepcopy(model.state_dict())
    model.apply(by_class_name)
    moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert moved == {'0.weight', '1.weight', '0.attention.bn.weight', '1.attention.bn.weight'}


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('place', [{}, dict(device='cpu', dtype=torch.float64)])
def test_a_layer_is_built_and_run_on_fake_tensors(norm, place):
    with FakeTensorMode():
        y = layer(norm_cfg=norm, **place)(torch.randn(4, 4, 6, 6, dtype=place.get('dtype')))
    assert y.shape == (4, 6, 6, 6)


class TestMemoryFormat:
    @pytest.mark.parametrize('mode', [True, False])
    @pytest.mark.parametrize('kernel_size', [1, 3])
    def test_a_network_in_channels_last(self, mode, kernel_size):
        model = nn.Sequential(
            layer(kernel_size=kernel_size), nn.BatchNorm2d(6), nn.ReLU(), layer(in_channels=6)
        ).double()
        randomise(model)
        x = image(dtype=torch.float64)
        results = []
        for memory_format in (torch.contiguous_format, torch.channels_last):
            other = copy.deepcopy(model).train(mode).to(memory_format=memory_format)
            leaf = x.clone().to(memory_format=memory_format).requires_grad_()
            y = other(leaf)
            assert y.is_contiguous(memory_format=memory_format)
            y.square().sum().backward()
            results.append([y, leaf.grad, *[p.grad for p in other.parameters()]])
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize(
        ('kind', 'size', 'memory_format'),
        [
            (ODConv1d, (8,), torch.channels_last),
            (ODConv3d, (5, 6, 4), torch.channels_last_3d),
        ],
    )
    def test_other_dimensions(self, kind, size, memory_format):
        model = layer(kind).double()
        randomise(model)
        x = torch.randn(3, 4, *size, dtype=torch.float64)
        results = []
        for convert in (False, True):
            other = copy.deepcopy(model)
            if convert:
                # PyTorch converts parameters of the format's own number of dimensions: the bank
                # of an ODConv1d, and the kernels of an ODConv2d's.
                for parameter in other.parameters():
                    if parameter.dim() == (4 if memory_format is torch.channels_last else 5):
                        parameter.data = parameter.data.contiguous(memory_format=memory_format)
            leaf = x.clone().requires_grad_()
            y = other(leaf)
            y.square().sum().backward()
            results.append([y, leaf.grad, *[p.grad for p in other.parameters()]])
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


class TestFiles:
    def test_safetensors(self, tmp_path):
        model, other = nn.Sequential(layer()), nn.Sequential(layer())
        randomise(model)
        set_temperature(model, 12.0)
        save_model(model, str(tmp_path / 'model.safetensors'))
        load_model(other, str(tmp_path / 'model.safetensors'))
        for name, value in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name
        assert other[0].temperature == 12.0

    @pytest.mark.parametrize('wrapped', ['saved', 'loaded'])
    def test_the_temperature_passes_activation_checkpointing(self, wrapped):
        model, other = nn.Sequential(layer()), nn.Sequential(layer())
        set_temperature(model, 9.0)
        if wrapped == 'saved':
            model[0].attention = checkpoint_wrapper(model[0].attention)
        else:
            other[0].attention = checkpoint_wrapper(other[0].attention)
        other.load_state_dict(model.state_dict())
        assert other[0].attention.temperature == 9.0


@pytest.mark.parametrize('strategy', [*STRATEGIES, 'auto'])
@pytest.mark.parametrize('reentrant', [True, False])
def test_activation_checkpointing(strategy, reentrant):
    model = layer(strategy=strategy, kernel_num=1).double()
    randomise(model)
    results = []
    for forward in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        x = image(dtype=torch.float64).requires_grad_()
        torch.manual_seed(1)
        x.data.normal_()
        y = forward(x)
        y.square().sum().backward()
        results.append([y, x.grad, *[p.grad.clone() for p in model.parameters()]])
    torch.testing.assert_close(*results)


@pytest.mark.filterwarnings('ignore:The BatchNorm in an ODConv')
@pytest.mark.parametrize('norm_cfg', NORMS)
class TestNorms:
    @pytest.mark.parametrize('batch', [1, 5])
    @pytest.mark.parametrize('reentrant', [True, False])
    def test_attentions_that_are_computed_again_have_the_same_bits(
        self, norm_cfg, batch, reentrant
    ):
        model = layer(norm_cfg=norm_cfg, attention_init='published')
        seen = []
        model.attention.register_forward_hook(lambda *args: seen.append(args[-1]))
        x = image(batch).requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        first, again = seen
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    def test_a_functional_call_moves_only_the_buffers_that_it_gets(self, norm_cfg):
        model, other = (layer(norm_cfg=norm_cfg, attention_init='published') for _ in range(2))
        other.load_state_dict(model.state_dict())
        before = copy.deepcopy(dict(model.named_buffers()))
        buffers = copy.deepcopy(before)
        x = image()
        y = functional_call(model, (dict(model.named_parameters()), buffers), x)
        assert torch.equal(y, other(x))
        for name, value in model.named_buffers():
            assert torch.equal(value, before[name])
            assert torch.equal(buffers[name], other.get_buffer(name))

    def test_no_decay_for_norms_means_those_of_the_attention_too(self, norm_cfg):
        model = layer(norm_cfg=norm_cfg)
        wrapper = DefaultOptimWrapperConstructor(
            dict(optimizer=dict(type='SGD', lr=0.1, weight_decay=0.1)), dict(norm_decay_mult=0.0)
        )(model)
        decays = groups_by_parameter(wrapper.optimizer.param_groups)
        for name, parameter in model.named_parameters():
            expected = 0.0 if name.startswith('attention.bn.') else 0.1
            assert decays[id(parameter)]['weight_decay'] == expected, name


@pytest.mark.parametrize('kind', [ODConv2d, CondConv2d, FDConv2d])
@pytest.mark.parametrize('padding_mode', ['zeros', 'reflect'])
class TestDerivatives:
    @pytest.fixture
    def model(self, kind, padding_mode):
        model = layer(kind, in_channels=2, out_channels=2, padding_mode=padding_mode).double()
        randomise(model)
        return model.eval()

    @pytest.fixture
    def x(self):
        return torch.randn(2, 2, 4, 4, dtype=torch.float64)

    def test_a_jacobian_of_all_outputs_at_once(self, model, x):
        torch.testing.assert_close(
            *(torch.autograd.functional.jacobian(model, x, vectorize=way) for way in (False, True))
        )

    def test_second_order(self, model, x):
        assert torch.autograd.gradgradcheck(model, x.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int64, torch.half, torch.double])
def test_a_refused_input_leaves_no_trace(dtype):
    model = layer()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match='should be the same'):
        model((image() * 9).to(dtype))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.filterwarnings('ignore:The BatchNorm in an ODConv')
@pytest.mark.parametrize('norm_cfg', [None, dict(type='LN'), dict(type='BN')])
def test_gradients_of_each_sample_by_function_transforms(norm_cfg):
    model = layer(norm_cfg=norm_cfg, attention_init='published').double().eval()
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    x = image(dtype=torch.float64)

    def loss(parameters, sample):
        return functional_call(model, (parameters, buffers), (sample[None],)).square().sum()

    actual = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for b in range(len(x)):
        model.zero_grad()
        model(x[b : b + 1]).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(actual[name][b], parameter.grad, msg=name)


def test_symbolic_traces_have_the_layer_as_a_leaf():
    model = nn.Sequential(layer(), nn.BatchNorm2d(6), nn.ReLU(), layer(in_channels=6)).eval()
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == 'call_module'] == list('0123')
    for batch in (1, 3):
        x = image(batch)
        torch.testing.assert_close(traced(x), model(x))


class TestSingleSamples:
    def test_statistics_that_cannot_be_estimated_are_warned_about(self):
        model = nn.Sequential(layer())
        with pytest.warns(UserWarning, match='single sample in training'):
            update_bn([image(1) for _ in range(4)], model)
        assert not model[0].attention.bn.running_mean.any()

    def test_batches_of_two_are_estimated_without_a_warning(self, recwarn):
        model = nn.Sequential(layer())
        update_bn([image(2) for _ in range(4)], model)
        assert model[0].attention.bn.running_mean.any()
        assert not [w for w in recwarn if 'single sample' in str(w.message)]


def as_ultralytics_fuses(conv, norm):
    """What that library's ``fuse()`` does to the weight and the bias of a convolution."""
    scale = torch.diag(norm.weight / (norm.eps + norm.running_var).sqrt())
    weight = scale @ conv.weight.view(conv.out_channels, -1)
    shift = norm.bias - norm.weight * norm.running_mean / (norm.eps + norm.running_var).sqrt()
    conv.weight = nn.Parameter(weight.view(conv.weight.shape))
    conv.bias = nn.Parameter(shift)
    return conv


@pytest.mark.parametrize('fuse', [fuse_conv_bn_eval, as_ultralytics_fuses])
@pytest.mark.parametrize('kernel_num', [1, 4, 6])
def test_fusing_as_for_a_plain_convolution_is_refused(fuse, kernel_num):
    """Where K equals the output channels it would change the outputs in silence."""
    model = nn.Sequential(layer(bias=False, kernel_num=kernel_num), nn.BatchNorm2d(6)).eval()
    randomise(model)
    x = image()
    expected = model(x)
    with torch.no_grad(), pytest.raises(RuntimeError):
        fuse(copy.deepcopy(model[0]), model[1])
    torch.testing.assert_close(fuse_odconv_bn(model)(x), expected, rtol=1e-4, atol=1e-4)
