"""RunningNorm against a BatchNorm in evaluation mode, and against statistics taken by hand."""

import copy
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mmdet_odconv import ODConv2d, ODResNet
from mmdet_odconv.compat import COMPILED_OPERATOR
from mmdet_odconv.layers import RunningNorm

CFG = dict(type='RunningNorm')


def batches(count, size, channels=3):
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1.0, channels + 1)
    return [torch.randn(size, channels, generator=generator) * scale - scale for _ in range(count)]


def test_evaluation_is_that_of_a_batch_norm():
    norm, batch_norm = RunningNorm(3), torch.nn.BatchNorm1d(3)
    for x in batches(5, 4):
        batch_norm(x)
    norm.load_state_dict(batch_norm.state_dict())
    x = batches(1, 4)[0]
    torch.testing.assert_close(norm.eval()(x), batch_norm.eval()(x))


@pytest.mark.parametrize('size', [1, 2, 8])
def test_the_statistics_become_those_of_the_data(size):
    norm = RunningNorm(3, momentum=0.001)
    for x in batches(6000 // size, size):
        norm(x)
    expected = torch.tensor([1.0, 2, 3])
    torch.testing.assert_close(norm.running_mean, -expected, rtol=0.1, atol=0.1)
    torch.testing.assert_close(norm.running_var, expected.square(), rtol=0.15, atol=0)


def test_a_sample_does_not_depend_on_the_others_in_training():
    layer = ODConv2d(4, 6, 3, norm_cfg=CFG, attention_init='published')
    for x in torch.randn(20, 2, 4, 5, 5):
        layer(x)
    x = torch.randn(2, 4, 5, 5)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    together = layer(x)
    layer.load_state_dict(state)
    torch.testing.assert_close(layer(x[:1]), together[:1])


def test_training_with_few_samples_does_not_warn():
    layer = ODConv2d(4, 6, 3, norm_cfg=CFG)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for size in (2, 1, 0):
            layer(torch.randn(size, 4, 5, 5)).sum().backward()
    assert layer.attention.bn.num_batches_tracked == 2


def test_activation_checkpointing_gives_the_same_statistics_and_gradients():
    """The kind that MMDetection's ``with_cp=True`` is."""
    plain, saving = RunningNorm(3), RunningNorm(3)
    for x in batches(4, 2):
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        plain(one).square().sum().backward()
        checkpoint(saving, other, use_reentrant=True).square().sum().backward()
        torch.testing.assert_close(other.grad, one.grad)
    torch.testing.assert_close(saving.state_dict(), plain.state_dict())


def test_norm_eval_holds_the_backbone_and_not_the_attentions():
    backbone = ODResNet(18, base_channels=8, norm_eval=True, odconv_cfg=dict(norm_cfg=CFG))
    backbone.train()
    backbone(torch.randn(2, 3, 32, 32))
    assert backbone.layer2[0].bn1.num_batches_tracked == 0
    assert backbone.layer2[0].conv1.attention.bn.num_batches_tracked == 1


@pytest.mark.skipif(not COMPILED_OPERATOR, reason='the operator is registered from torch 2.7 on')
def test_compiles_as_one_graph_with_the_same_gradients_and_statistics():
    torch._dynamo.reset()
    eager = ODConv2d(4, 6, 3, norm_cfg=CFG, attention_init='published')
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
    for x in torch.randn(3, 2, 4, 6, 6):
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        eager(one).square().sum().backward()
        compiled(other).square().sum().backward()
        torch.testing.assert_close(other.grad, one.grad)
    for one, other in zip(eager.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad)
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())
    torch._dynamo.reset()


def test_takes_the_weights_of_a_layer_with_a_batch_norm():
    published = ODConv2d(4, 6, 3, attention_init='published')
    published(torch.randn(8, 4, 5, 5))
    layer = ODConv2d(4, 6, 3, norm_cfg=CFG)
    layer.load_state_dict(published.state_dict())
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(layer.eval()(x), published.eval()(x))
