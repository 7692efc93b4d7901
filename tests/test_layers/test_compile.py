"""The layers under TorchScript's tracing and under torch.compile."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from mmdet_odconv import ODConv1d, ODConv2d, ODConv3d, set_temperature
from mmdet_odconv.compat import COMPILED_OPERATOR, ONNX_EXPORT
from mmdet_odconv.functional import STRATEGIES
from tests.reference import randomise, relative_error
from tests.test_functional.test_operator import TOOL

needs_operator = pytest.mark.skipif(
    not COMPILED_OPERATOR, reason='the operator is registered from torch 2.7 on'
)
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
# Two ways to round to bfloat16.
ROUNDED = dict(rtol=0.05, atol=0.05)


def layer(kind=ODConv2d, **options):
    args = dict(in_channels=4, out_channels=6, kernel_size=3) | options
    layer = kind(**args)
    randomise(layer)
    return layer.eval()


@pytest.fixture
def compiler():
    """Ahead-of-time graphs without code generation, and how many of them were made."""
    if not COMPILED_OPERATOR:
        pytest.skip('the operator is one call for torch.compile from torch 2.7 on')
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


@needs_operator
@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('option', OPTIONS)
def test_inference_gives_the_compiler_the_operations(option, batch):
    """And not one operator that it cannot look into; only large kernels are left to that."""
    eager = layer(**OPTIONS[option])
    graphs = []

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    torch._dynamo.reset()
    run = torch.compile(eager, fullgraph=True, backend=backend)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(batch, 4, 6, 6).to(memory_format=torch.channels_last)
        autocast = torch.autocast('cpu', dtype=dtype, enabled=dtype != torch.float32)
        with torch.no_grad(), autocast:
            y, expected = run(x), eager(x)
        assert y.dtype == dtype
        assert y.stride() == expected.stride()
        torch.testing.assert_close(y, expected, **({} if dtype == torch.float32 else ROUNDED))
    assert not any('mmdet_odconv' in target for graph in graphs for target in graph)
    torch._dynamo.reset()


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


def network(norm_cfg, **options):
    """Several layers of different kinds, with norms and activations between them."""
    odconv = dict(norm_cfg=norm_cfg, attention_init='published', **options)
    model = nn.Sequential(
        ODConv2d(4, 8, 3, padding=1, **odconv),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        ODConv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False, **odconv),
        ODConv2d(8, 6, 1, **odconv),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
    )
    randomise(model)
    return model


def outputs_and_gradients(forward, model, x):
    """The output, and the gradients of the input, of all parameters and the statistics after."""
    model.zero_grad()
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    # Before the network, so that a wrong gradient of its input shows in a parameter as well.
    before = (leaf * 1.5).tanh()
    y = forward(before)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    (y * weights).sum().backward()
    return [y.detach(), leaf.grad, *[p.grad.clone() for p in model.parameters()]]


@needs_operator
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('kernel_num', [1, 3])
def test_machine_code_has_the_gradients_of_eager(kernel_num, memory_format):
    """Under inductor: of all parameters and of the input, in a network of several layers."""
    torch._dynamo.reset()
    model = network(dict(type='BN'), kernel_num=kernel_num)
    compiled = copy.deepcopy(model)
    x = torch.randn(4, 4, 10, 9).to(memory_format=memory_format)
    expected = outputs_and_gradients(model, model, x)
    run = torch.compile(compiled, fullgraph=True)
    actual = outputs_and_gradients(run, compiled, x)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    for (name, a), b in zip(model.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(run.eval()(x), model.eval()(x), rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


def test_compiled_training_keeps_what_eager_keeps(compiler):
    """And not what the formula's operations would keep, several times as much."""
    layers = [ODConv2d(8, 8, 3, padding=1, kernel_num=4) for _ in range(3)]
    model = nn.Sequential(*layers)
    x = torch.randn(4, 8, 12, 12)
    eager = TOOL.saved_bytes(model, x)
    compiled = TOOL.saved_bytes(torch.compile(model, fullgraph=True, backend=compiler), x)
    assert compiler.frame_count == 1
    assert 0 < compiled <= 1.1 * eager


@pytest.mark.parametrize('strategy', [*STRATEGIES, 'auto'])
def test_every_strategy_compiles(compiler, strategy):
    model = nn.Sequential(layer(kernel_num=1, strategy=strategy))
    x = torch.randn(2, 4, 6, 6)
    run = torch.compile(model, fullgraph=True, backend=compiler)
    expected = outputs_and_gradients(model, model, x)
    torch.testing.assert_close(outputs_and_gradients(run, model, x), expected)


@pytest.mark.parametrize('training', [True, False])
def test_an_empty_batch_compiles(compiler, training):
    model = nn.Sequential(layer(), layer(in_channels=6))
    x = torch.randn(0, 4, 6, 6, requires_grad=training)
    run = torch.compile(model, fullgraph=True, backend=compiler)
    with torch.set_grad_enabled(training):
        y = run(x)
    assert y.shape == (0, 6, 2, 2)
    if training:
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert all((p.grad == 0).all() for p in model.parameters())


def test_mixed_precision_compiles(compiler):
    model = nn.Sequential(layer(), layer(in_channels=6))
    x = torch.randn(2, 4, 6, 6)
    run = torch.compile(model, fullgraph=True, backend=compiler)
    results = []
    for forward in (model, run):
        model.zero_grad()
        with torch.autocast('cpu', dtype=torch.bfloat16):
            y = forward(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        results.append([y.float(), *[p.grad.clone() for p in model.parameters()]])
    for eager, compiled in zip(*results, strict=True):
        # The two round to bfloat16 at other places.
        assert relative_error(compiled, eager) < 0.02


@needs_operator
@pytest.mark.parametrize('batch', [1, 2])
def test_the_registered_operator_passes_the_checks_of_pytorch(batch):
    x, bank = torch.randn(batch, 4, 6, 6), torch.randn(3, 6, 4, 3, 3)
    attentions = [torch.rand(batch, n) for n in (4, 6, 9, 3)]
    inputs = [t.requires_grad_() for t in (x, bank, *attentions)]
    args = (*inputs, None, [1, 1], [1, 1], [1, 1], 1, 'auto', True)
    torch.library.opcheck(torch.ops.mmdet_odconv.odconv.default, args)


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


@pytest.mark.skipif(not ONNX_EXPORT, reason='torch.export leaves the batch free from torch 2.6 on')
@pytest.mark.parametrize('option', OPTIONS)
def test_an_exported_layer_takes_any_batch(option):
    """In a graph for any batch each sample gets what it gets alone."""
    eager = layer(**OPTIONS[option])
    free = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(eager, (torch.randn(2, 4, 6, 6),), dynamic_shapes=(free,))
    for batch in (1, 5):
        x = torch.randn(batch, 4, 6, 6)
        torch.testing.assert_close(program.module()(x), eager(x), rtol=1e-4, atol=1e-5)
