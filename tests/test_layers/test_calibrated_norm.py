"""CalibratedNorm against a BatchNorm in evaluation mode, and against statistics taken by hand."""

import copy

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch.utils.checkpoint import checkpoint

from mmdet_odconv import CalibratedNorm, ODConv2d, ODResNet, calibrate
from mmdet_odconv.compat import COMPILED_OPERATOR

CFG = dict(type='CalibratedNorm')


def batches(count, size, channels=3):
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1.0, channels + 1)
    return [torch.randn(size, channels, generator=generator) * scale - scale for _ in range(count)]


def calibrated_layer(**kwargs):
    layer = ODConv2d(4, 6, 3, norm_cfg=CFG, attention_init='published', **kwargs)
    with calibrate(layer):
        layer(torch.randn(20, 4, 5, 5))
    return layer


@pytest.mark.parametrize('training', [True, False])
def test_computes_what_a_batch_norm_does_in_evaluation(training):
    norm, batch_norm = CalibratedNorm(3), torch.nn.BatchNorm1d(3)
    torch.nn.init.normal_(batch_norm.weight)
    torch.nn.init.normal_(batch_norm.bias)
    for x in batches(5, 4):
        batch_norm(x)
    norm.load_state_dict(batch_norm.state_dict())
    x = batches(1, 4)[0]
    torch.testing.assert_close(norm.train(training)(x), batch_norm.eval()(x))


def test_one_calibration_gives_the_statistics_of_all_its_images():
    norm, data = CalibratedNorm(3).double(), torch.cat(batches(4, 5)).double() + 1000
    with calibrate(norm):
        for x in data.split([1, 3, 6, 10]):
            norm(x)
    torch.testing.assert_close(norm.running_mean, data.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.running_var, data.var(0, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize('size', [1, 2, 8])
def test_calibrations_average_until_the_momentum_holds(size):
    norm = CalibratedNorm(3, momentum=0.001)
    data = batches(800 // size, size)
    for x in data:
        with calibrate(norm):
            norm(x)
    whole = torch.cat(data)
    torch.testing.assert_close(norm.running_mean, whole.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.running_var, whole.var(0, correction=0), rtol=1e-3, atol=0)
    assert norm.num_batches_tracked == len(data)


def test_a_calibration_that_sees_nothing_changes_nothing():
    norm = CalibratedNorm(3)
    with calibrate(norm):
        norm(torch.empty(0, 3))
    assert norm.num_batches_tracked == 0
    torch.testing.assert_close(norm.running_var, torch.ones(3))


def test_a_sample_does_not_depend_on_the_others_in_training():
    layer, x = calibrated_layer(), torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(layer(x[:1]), layer(x)[:1])


@pytest.mark.parametrize('reentrant', [True, False])
def test_a_forward_pass_can_be_computed_again(reentrant):
    plain = calibrated_layer()
    saving = copy.deepcopy(plain)
    for x in torch.randn(4, 2, 4, 5, 5):
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        plain(one).square().sum().backward()
        checkpoint(saving, other, use_reentrant=reentrant).square().sum().backward()
        assert torch.equal(other.grad, one.grad)
    torch.testing.assert_close(saving.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_no_forward_pass_moves_the_statistics():
    layer = calibrated_layer()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(2, 4, 5, 5)
    layer.train()(x)
    torch.func.functional_call(layer, dict(layer.named_parameters()), (x,))
    torch.optim.swa_utils.update_bn([x], layer)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_norm_eval_and_conversions_of_batch_norms_leave_it_alone():
    backbone = ODResNet(18, base_channels=8, norm_eval=True, odconv_cfg=dict(norm_cfg=CFG))
    backbone.train()
    with calibrate(backbone):
        backbone(torch.randn(2, 3, 32, 32))
    assert backbone.layer2[0].bn1.num_batches_tracked == 0
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
    assert type(converted.layer2[0].conv1.attention.bn) is CalibratedNorm
    assert converted.layer2[0].conv1.attention.bn.num_batches_tracked == 1


def test_rules_for_norms_apply_to_it():
    layer = ODConv2d(4, 6, 3, norm_cfg=CFG)
    wrapper = build_optim_wrapper(
        layer,
        dict(
            optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
            paramwise_cfg=dict(norm_decay_mult=0.0),
        ),
    )
    decays = {
        id(p): group['weight_decay'] for group in wrapper.param_groups for p in group['params']
    }
    assert decays[id(layer.attention.bn.weight)] == 0
    assert decays[id(layer.attention.fc.weight)] == 0.05


@pytest.mark.skipif(not COMPILED_OPERATOR, reason='the operator is registered from torch 2.7 on')
def test_compiles_as_one_graph_with_the_same_gradients():
    torch._dynamo.reset()
    eager = calibrated_layer()
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
    for x in torch.randn(3, 2, 4, 6, 6):
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        eager(one).square().sum().backward()
        compiled(other).square().sum().backward()
        torch.testing.assert_close(other.grad, one.grad)
    torch._dynamo.reset()


def test_takes_the_weights_of_a_layer_with_a_batch_norm():
    published = ODConv2d(4, 6, 3, attention_init='published')
    published(torch.randn(8, 4, 5, 5))
    layer = ODConv2d(4, 6, 3, norm_cfg=CFG)
    layer.load_state_dict(published.state_dict())
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(layer.eval()(x), published.eval()(x))
