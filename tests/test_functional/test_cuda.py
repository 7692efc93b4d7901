"""Everything again on a GPU; without one, these tests are skipped."""

import copy
import warnings

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from mmdet_odconv import ODConv2d, ODMobileNetV2
from mmdet_odconv.functional import Attentions, odconv, record_strategies
from tests.conftest import ROOT
from tests.test_functional.test_operator import CASES, given, outputs_and_gradients

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU'),
]
CUDA = 'cuda'


@pytest.fixture(autouse=True)
def _full_precision():
    """Without TF32, whose products have ten bits."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def moved(inputs, dtype):
    x, bank, attentions = inputs
    attentions = Attentions(*[None if a is None else a.to(CUDA, dtype) for a in attentions])
    return x.to(CUDA, dtype), bank.to(CUDA, dtype), attentions


@pytest.mark.parametrize('name', ['reference', 'grouped_conv', 'auto'])
@pytest.mark.parametrize(('option', 'ndim'), [case[:2] for case in CASES])
@pytest.mark.parametrize('kernel_num', [1, 3])
def test_equals_the_formula(name, option, ndim, kernel_num):
    inputs, call = given(option, ndim, kernel_num)
    expected = outputs_and_gradients(*inputs, **call, strategy='reference')
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        actual = outputs_and_gradients(*moved(inputs, dtype), **call, strategy=name)
        actual = [t.to('cpu', torch.float64) for t in actual]
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_the_grouped_convolution_is_taken():
    with record_strategies() as choices:
        network().eval()(images())
    assert {choice.strategy for choice in choices} == {'grouped_conv'}


@pytest.mark.parametrize('strategy', ['cpu_grouped_conv', 'cpu_im2col'])
def test_what_is_made_for_a_cpu_is_refused(strategy):
    layer = ODConv2d(4, 4, 3, strategy=strategy).to(CUDA)
    with pytest.raises(ValueError, match=f'{strategy}.* cannot be used: the device is cuda'):
        layer(torch.randn(2, 4, 8, 8, device=CUDA))


def network(**options):
    torch.manual_seed(0)
    layers = [ODConv2d(3, 16, 3, stride=2, attention_init='published', **options), nn.ReLU()]
    layers += [ODConv2d(16, 32, 1, bias=False, **options), nn.BatchNorm2d(32), nn.ReLU()]
    layers += [ODConv2d(32, 32, 3, groups=32, padding=1, **options), nn.ReLU()]
    return nn.Sequential(*layers, ODConv2d(32, 8, 3, groups=4, **options)).to(CUDA)


def images(batch=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 20, 24, generator=generator).to(CUDA)


def grad_scaler(enabled):
    if hasattr(torch.amp, 'GradScaler'):
        return torch.amp.GradScaler(CUDA, enabled=enabled)
    return torch.cuda.amp.GradScaler(enabled=enabled)  # before torch 2.3


def step(model, x, dtype=None):
    """The output and the gradients of a training step, in mixed precision if a type is given."""
    scaler = grad_scaler(enabled=dtype is torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast(CUDA, dtype or torch.float16, enabled=dtype is not None):
        y = model(x)
    scaler.scale(y.float().square().mean()).backward()
    scaler.unscale_(optimizer)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    scaler.step(optimizer)
    scaler.update()
    return y.detach(), gradients


@pytest.mark.parametrize('kernel_num', [1, 4])
def test_a_training_step_is_that_of_the_cpu(kernel_num):
    model = network(kernel_num=kernel_num).double()
    other = copy.deepcopy(model).cpu()
    x = images().double()
    y, gradients = step(model, x)
    expected = other(x.cpu())
    expected.square().mean().backward()
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-8, atol=1e-8)
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(gradients[name].cpu(), parameter.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('kernel_num', [1, 4])
def test_mixed_precision(dtype, kernel_num):
    model = network(kernel_num=kernel_num)
    y, gradients = step(copy.deepcopy(model), images(), dtype)
    expected, exact = step(model, images())
    assert y.dtype == dtype
    tolerance = 64 * torch.finfo(dtype).eps
    assert (y.float() - expected).norm() <= tolerance * expected.norm()
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        scale = exact[name].norm() + 1e-3
        assert (gradient - exact[name]).norm() <= 4 * tolerance * scale, name


def test_channels_last_is_kept():
    model = network().eval()
    expected = model(images())
    model = model.to(memory_format=torch.channels_last)
    y = model(images().contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('amp', [False, True])
def test_nothing_waits_for_the_device(amp):
    model, x = network(), images().requires_grad_()

    def run():
        with torch.autocast(CUDA, torch.float16, enabled=amp):
            y = model(x)
        y.float().square().mean().backward()

    run()  # cuDNN's first call may wait
    torch.cuda.set_sync_debug_mode('error')
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode('default')


def test_a_graph_can_be_captured():
    model, x = network().eval(), images()
    other = images().flip(0) * 2
    with torch.no_grad():
        expected = model(other)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        x.copy_(other)
        graph.replay()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize('training', [True, False])
def test_compiles(training):
    torch._dynamo.reset()
    model, x = network().train(training), images()
    results = []
    for forward in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        state = copy.deepcopy(model.state_dict())
        y = forward(x)
        y.square().mean().backward()
        results.append([y.detach(), *[p.grad.clone() for p in model.parameters()]])
        model.load_state_dict(state)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_works_as_the_default_device():
    with torch.device(CUDA):
        layer = ODConv2d(4, 4, 3)
    assert {p.device.type for p in (*layer.parameters(), *layer.buffers())} == {CUDA}
    torch.set_default_device(CUDA)
    try:
        x = torch.randn(2, 4, 8, 8, requires_grad=True)
        layer(x).sum().backward()
    finally:
        torch.set_default_device(None)
    # What the GPU did must not be seen by a layer on the CPU.
    cpu, x = ODConv2d(4, 4, 3).double().eval(), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    attentions = cpu.attention(x)
    expected = odconv(x, cpu.weight, attentions, cpu.bias, strategy='reference')
    torch.testing.assert_close(cpu(x), expected)


def test_a_backbone_and_a_detector_train():
    model = ODMobileNetV2(0.25).to(CUDA)
    sum(y.square().mean() for y in model(images())).backward()
    init_default_scope('mmdet')
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs

    config = Config.fromfile(ROOT / 'configs/odconv/retinanet_od_r18_shapes.py')
    detector = MODELS.build(config.model).to(CUDA)
    detector.init_weights()
    data = detector.data_preprocessor(
        demo_mm_inputs(2, [[3, 64, 64], [3, 96, 64]], num_classes=5, use_box_type=True), True
    )
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # mmdet's own, about how tensors are made
        losses = detector(**data, mode='loss')
    total = detector.parse_losses(losses)[0]
    total.backward()
    assert total.isfinite()
    assert all(p.grad.isfinite().all() for p in detector.parameters() if p.grad is not None)
