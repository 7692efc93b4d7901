"""The layers under TorchScript's tracing and under torch.compile."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from mmdet_odconv import ODConv1d, ODConv2d, ODConv3d, set_temperature
from tests.reference import randomise

OPTIONS = {
    'default': {},
    'K1': dict(kernel_num=1),
    '1x1': dict(kernel_size=1),
    '1x1_K1': dict(kernel_size=1, kernel_num=1),
    'depthwise': dict(groups=4, out_channels=4),
    'reflect': dict(padding=1, padding_mode='reflect'),
    'layer_norm': dict(norm_cfg=dict(type='LN')),
    'no_norm': dict(norm_cfg=None),
}


def layer(kind=ODConv2d, **options):
    args = dict(in_channels=4, out_channels=6, kernel_size=3) | options
    layer = kind(**args)
    randomise(layer)
    return layer.eval()


@pytest.fixture
def compiler():
    """Ahead-of-time graphs without code generation, and how many of them were made."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend('aot_eager')
    torch._dynamo.reset()


@pytest.mark.parametrize('option', OPTIONS)
@pytest.mark.parametrize('training', [True, False])
def test_compiles_as_one_graph_with_the_same_gradients(compiler, option, training):
    eager = layer(**OPTIONS[option]).train(training)
    compiled = torch.compile(eager, fullgraph=True, backend=compiler)
    x = torch.randn(2, 4, 6, 6)
    results = []
    for forward in (eager, compiled):
        eager.zero_grad()
        y = forward(x)
        y.square().sum().backward()
        results.append([y.detach(), *[p.grad.clone() for p in eager.parameters()]])
    torch.testing.assert_close(*results)
    assert compiler.frame_count == 1


@pytest.mark.parametrize(('kind', 'ndim'), [(ODConv1d, 1), (ODConv3d, 3)])
def test_compiles_in_other_dimensions(compiler, kind, ndim):
    eager = layer(kind)
    x = torch.randn(2, 4, *(5,) * ndim)
    torch.testing.assert_close(torch.compile(eager, fullgraph=True, backend=compiler)(x), eager(x))


def test_annealing_the_temperature_compiles_once_more_at_most(compiler):
    eager = layer()
    compiled = torch.compile(eager, fullgraph=True, backend=compiler)
    x = torch.randn(2, 4, 6, 6)
    for temperature in (30.0, 28.5, 20.0, 12.3, 7.0, 3.1, 2.0, 1.5, 1.0):
        set_temperature(eager, temperature)
        torch.testing.assert_close(compiled(x), eager(x))
    assert compiler.frame_count <= 3


def test_other_batches_and_sizes_do_not_compile_for_ever(compiler):
    eager = layer()
    compiled = torch.compile(eager, fullgraph=True, backend=compiler)
    for batch, size in ((2, 6), (3, 7), (4, 9), (5, 8), (7, 12), (9, 5)):
        x = torch.randn(batch, 4, size, size)
        torch.testing.assert_close(compiled(x), eager(x))
    assert compiler.frame_count <= 6


@pytest.mark.slow
def test_compiles_to_machine_code():
    torch._dynamo.reset()
    eager = layer()
    compiled = torch.compile(eager, fullgraph=True)
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore::DeprecationWarning')
class TestTorchScript:
    @pytest.mark.parametrize('option', OPTIONS)
    @pytest.mark.parametrize('batch', [1, 2])
    def test_a_traced_layer_takes_images_of_other_sizes(self, tmp_path, option, batch):
        eager = layer(**OPTIONS[option])
        path = tmp_path / 'layer.pt'
        torch.jit.trace(eager, torch.randn(batch, 4, 6, 6)).save(path)
        loaded = torch.jit.load(path)
        x = torch.randn(batch, 4, 9, 7)
        torch.testing.assert_close(loaded(x), eager(x))

    @pytest.mark.parametrize('option', ['default', 'depthwise', 'K1'])
    @pytest.mark.parametrize('batch', [1, 2])
    def test_a_traced_layer_refuses_other_batches(self, option, batch):
        """A trace is of one batch size: another one must not give wrong numbers silently."""
        model = nn.Sequential(layer(**OPTIONS[option]))
        channels = model[0].out_channels
        model.append(nn.BatchNorm2d(channels).eval())
        traced = torch.jit.trace(model, torch.randn(batch, 4, 6, 6))
        with pytest.raises(RuntimeError):
            traced(torch.randn(batch + 1, 4, 6, 6))
