"""Rates and decays that ODConv's parameters get."""

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS
from torch import nn

from mmdet_odconv import ODConv2d, ODConvOptimWrapperConstructor
from mmdet_odconv.layers import ODAttention

RATE, DECAY = 0.01, 0.1


class Detector(nn.Module):
    """Has ODConv, a plain convolution, a norm, and a module that is called attention as well."""

    def __init__(self, **odconv):
        super().__init__()
        self.backbone = nn.Sequential(
            ODConv2d(4, 8, 3, kernel_num=4, **odconv), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        )
        self.depthwise = ODConv2d(8, 8, 3, groups=8, kernel_num=2)
        self.attention = nn.Sequential(nn.Conv2d(8, 8, 1))


def rates(model, optimizer='SGD', **paramwise):
    """Rate and decay by the name of the parameter."""
    wrapper = build_optim_wrapper(
        model,
        dict(
            optimizer=dict(type=optimizer, lr=RATE, weight_decay=DECAY),
            constructor='ODConvOptimWrapperConstructor',
            paramwise_cfg=paramwise,
        ),
    )
    groups = wrapper.optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    found = [names[id(p)] for group in groups for p in group['params']]
    assert len(found) == len(set(found))
    return {
        names[id(p)]: (group['lr'], group['weight_decay'])
        for group in groups
        for p in group['params']
    }


def test_without_options_nothing_differs():
    found = rates(Detector())
    assert set(found) == {name for name, _ in Detector().named_parameters()}
    assert set(found.values()) == {(RATE, DECAY)}


def test_attentions_are_found_by_their_class():
    model = Detector()
    attentions = {
        f'{name}.{p}'
        for name, module in model.named_modules()
        if isinstance(module, ODAttention)
        for p, _ in module.named_parameters()
    }
    found = rates(model, attention_lr_mult=0.1, attention_decay_mult=0.5)
    assert 'attention.0.weight' in found
    for name, values in found.items():
        expected = (RATE * 0.1, DECAY * 0.5) if name in attentions else (RATE, DECAY)
        assert values == pytest.approx(expected), name


def test_rules_for_biases_and_norms_do_not_come_on_top():
    """FCOS has twice the rate for its biases; the attention's decays of biases and norms stay."""
    found = rates(
        Detector(),
        attention_lr_mult=0.1,
        bias_lr_mult=2.0,
        bias_decay_mult=0.0,
        norm_decay_mult=0.0,
    )
    attention = 'backbone.0.attention'
    assert found[f'{attention}.channel_fc.bias'] == pytest.approx((RATE * 0.1, 0))
    assert found[f'{attention}.channel_fc.weight'] == pytest.approx((RATE * 0.1, DECAY))
    assert found[f'{attention}.bn.weight'] == pytest.approx((RATE * 0.1, 0))
    assert found['backbone.0.bias'] == found['backbone.2.bias'] == pytest.approx((RATE * 2, 0))
    assert found['backbone.0.weight'] == pytest.approx((RATE, DECAY))


def test_a_rate_of_the_backbone_is_shared_by_its_attentions():
    found = rates(Detector(), attention_lr_mult=0.5, custom_keys={'backbone': dict(lr_mult=0.1)})
    assert found['backbone.0.weight'] == pytest.approx((RATE * 0.1, DECAY))
    assert found['backbone.0.attention.fc.weight'] == pytest.approx((RATE * 0.05, DECAY))
    assert found['depthwise.attention.fc.weight'] == pytest.approx((RATE * 0.5, DECAY))


@pytest.mark.parametrize('factor', [0.1, 0.0])
@pytest.mark.parametrize('key', ['attention', 'kernel_fc', 'backbone.0.attention.kernel_fc.bias'])
def test_a_key_of_the_user_for_the_attention_wins(key, factor):
    found = rates(
        Detector(),
        attention_lr_mult=0.3,
        bank_lr_mult=4.0,
        custom_keys={key: dict(lr_mult=factor), 'backbone': dict(lr_mult=0.5)},
    )
    assert found['backbone.0.attention.kernel_fc.bias'] == pytest.approx((RATE * factor, DECAY))
    assert found['backbone.0.weight'] == pytest.approx((RATE * 2, DECAY / 4))
    if key != 'attention':
        name = 'backbone.0.attention.channel_fc.weight'
        assert found[name] == pytest.approx((RATE * 0.15, DECAY))


def test_a_key_of_the_user_for_a_decay_or_a_bank_wins():
    found = rates(
        Detector(),
        attention_lr_mult=0.3,
        attention_decay_mult=0.5,
        bank_lr_mult=4.0,
        custom_keys={
            'channel_fc': dict(decay_mult=0.0),
            'backbone.0.weight': dict(lr_mult=0.0),
            'depthwise.weight': dict(decay_mult=0.0),
        },
    )
    assert found['backbone.0.attention.channel_fc.bias'] == pytest.approx((RATE * 0.3, 0))
    assert found['backbone.0.attention.filter_fc.bias'] == pytest.approx((RATE * 0.3, DECAY / 2))
    assert found['backbone.0.weight'] == pytest.approx((0, DECAY))
    assert found['depthwise.weight'] == pytest.approx((RATE * 4, 0))


def test_an_optimizer_around_another_has_the_rates():
    """Such as SAM, whose own groups are those of the optimizer that it was given."""

    @OPTIMIZERS.register_module(force=True)
    class Around(torch.optim.Optimizer):
        def __init__(self, params, base, **defaults):
            super().__init__(params, defaults)
            self.base = getattr(torch.optim, base)(self.param_groups, **defaults)
            self.param_groups = self.base.param_groups

        def step(self, closure=None):
            self.base.step()

    model, cfg = Detector(), dict(type='Around', base='SGD', lr=RATE, weight_decay=DECAY)
    paramwise = dict(attention_lr_mult=0.0, bank_lr_mult='compensated')
    wrapper = build_optim_wrapper(
        model,
        Config(
            dict(
                optimizer=cfg,
                constructor='ODConvOptimWrapperConstructor',
                paramwise_cfg=paramwise,
            )
        ),
    )
    layer = model.backbone[0]
    before = layer.attention.channel_fc.bias.clone()
    wrapper.update_params(model.backbone(torch.rand(4, 4, 6, 6)).square().mean())
    assert torch.equal(layer.attention.channel_fc.bias, before)
    assert layer.attention.channel_fc.bias.grad is None  # a step was made
    (group,) = (g for g in wrapper.optimizer.base.param_groups if g['params'][0] is layer.weight)
    assert group['lr'] == pytest.approx(RATE * 4 / layer.attention.constant_product() ** 2)


def test_an_optimizer_in_shards_steps():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        model = Detector()
        cfg = dict(type='ZeroRedundancyOptimizer', optimizer_type='SGD', lr=RATE, weight_decay=0.0)
        wrapper = build_optim_wrapper(
            model,
            dict(
                optimizer=cfg,
                constructor='ODConvOptimWrapperConstructor',
                paramwise_cfg=dict(attention_lr_mult=0.0),
            ),
        )
        layer = model.backbone[0]
        before = layer.weight.clone(), layer.attention.channel_fc.bias.clone()
        wrapper.update_params(model.backbone(torch.rand(4, 4, 6, 6)).square().mean())
        assert not torch.equal(layer.weight, before[0])
        assert torch.equal(layer.attention.channel_fc.bias, before[1])
    finally:
        torch.distributed.destroy_process_group()


def test_what_the_optimizer_itself_sets_holds():
    model = Detector()
    cfg = dict(optimizer=dict(type='AdamW'), constructor='ODConvOptimWrapperConstructor')
    wrapper = build_optim_wrapper(model, dict(cfg, paramwise_cfg=dict(attention_lr_mult=0.1)))
    found = {
        id(p): (group['lr'], group['weight_decay'])
        for group in wrapper.optimizer.param_groups
        for p in group['params']
    }
    default = torch.optim.AdamW([model.depthwise.weight]).defaults
    expected = default['lr'], default['weight_decay']
    assert found[id(model.depthwise.weight)] == expected
    name = model.depthwise.attention.fc.weight
    assert found[id(name)] == pytest.approx((expected[0] / 10, expected[1]))


def test_depthwise_layers_have_the_decay_of_depthwise_convolutions():
    found = rates(Detector(), dwconv_decay_mult=0.0)
    assert found['depthwise.weight'] == (RATE, 0)
    assert found['backbone.0.weight'] == (RATE, DECAY)


def test_a_number_for_the_banks():
    found = rates(Detector(), bank_lr_mult=4.0)
    assert found['backbone.0.weight'] == pytest.approx((RATE * 4, DECAY / 4))
    assert found['backbone.2.weight'] == (RATE, DECAY)


@pytest.mark.parametrize('attention_bias', [0.0, 2.2])
def test_a_compensated_bank_moves_as_the_static_kernel(attention_bias):
    """One step of SGD changes what the layer computes as much as the plain convolution's."""
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 8, 3, bias=False).double()
    layer = ODConv2d.like(plain, kernel_num=4, attention_bias=attention_bias)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    optimizer = dict(type='SGD', lr=0.1, weight_decay=0.2)
    paramwise = dict(bank_lr_mult='compensated', attention_lr_mult=0.0)
    for module, constructor in (
        (plain, dict()),
        (
            layer,
            dict(constructor='ODConvOptimWrapperConstructor', paramwise_cfg=paramwise),
        ),
    ):
        model = nn.Sequential(module)
        wrapper = build_optim_wrapper(model, dict(optimizer=optimizer, **constructor))
        wrapper.update_params(model(x).square().mean())
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize('kernel_num', [1, 4])
def test_with_adamw_a_compensated_bank_moves_by_its_size(kernel_num):
    plain = nn.Conv2d(32, 64, 3)
    layer = ODConv2d.like(plain, kernel_num=kernel_num, spread=0.7)
    layer.load_state_dict(plain.state_dict())
    size = (layer.weight.square().mean() / plain.weight.square().mean()).sqrt().item()
    paramwise = dict(bank_lr_mult='compensated')
    wrapper = build_optim_wrapper(
        nn.Sequential(layer),
        dict(
            constructor='ODConvOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=RATE, weight_decay=DECAY),
            paramwise_cfg=paramwise,
        ),
    )
    (group,) = (g for g in wrapper.optimizer.param_groups if g['params'][0] is layer.weight)
    assert (group['lr'], group['weight_decay']) == pytest.approx(
        (RATE * size, DECAY / size), rel=0.01
    )


def test_the_log_has_a_row_for_each_rate_and_no_line_for_each_parameter(tmp_path):
    logger = MMLogger.get_instance('test_optim', log_file=str(tmp_path / 'log'))
    model = Detector()
    model.attention.requires_grad_(False)
    rates(model, attention_lr_mult=0.1, norm_decay_mult=0.0)
    text = (tmp_path / 'log').read_text()
    assert 'paramwise_options' not in text
    assert 'requires_grad' not in text
    lines = text[text.index('Learning rates:') :].splitlines()[4:-1]
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    banks = [row[1:4] for row in rows if row[0] == 'kernel banks of ODConv']
    assert banks == [['0.01', '0.1', '2']]
    assert {row[1] for row in rows if row[0] == 'attentions of ODConv'} == {'0.001'}
    assert ['not trained', ''] in [row[1:3] for row in rows]
    assert sum(int(row[3]) for row in rows) == len([*model.parameters()])
    logger.info('paramwise_options -- of another constructor')
    assert 'of another constructor' in (tmp_path / 'log').read_text()


def test_frozen_parameters_are_left_out():
    model = Detector()
    model.backbone[0].weight.requires_grad_(False)
    found = rates(model, attention_lr_mult=0.1, norm_decay_mult=1.0)
    assert 'backbone.0.weight' not in found
    assert found['backbone.0.attention.fc.weight'] == pytest.approx((RATE * 0.1, DECAY))


def test_on_top_of_a_constructor_with_layer_decay():
    @OPTIM_WRAPPER_CONSTRUCTORS.register_module(force=True)
    class HalfForTheBackbone:
        def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
            self.cfg = optim_wrapper_cfg

        def __call__(self, model):
            parts = [(model.backbone, 0.5), (model.depthwise, 1.0), (model.attention, 1.0)]
            groups = [dict(params=[*m.parameters()], lr=RATE * f) for m, f in parts]
            wrapper = build_optim_wrapper(model, self.cfg)
            wrapper.optimizer = type(wrapper.optimizer)(groups, lr=RATE, weight_decay=DECAY)
            return wrapper

    found = rates(Detector(), base='HalfForTheBackbone', attention_lr_mult=0.1)
    assert found['backbone.0.weight'] == pytest.approx((RATE / 2, DECAY))
    assert found['backbone.0.attention.bn.weight'] == pytest.approx((RATE / 20, DECAY))
    assert found['depthwise.attention.fc.weight'] == pytest.approx((RATE / 10, DECAY))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(attention_lr_mult=-1), 'attention_lr_mult must be at least 0, got -1'),
        (dict(attention_lr_mult='low'), "attention_lr_mult .*got 'low'"),
        (dict(attention_lr_mul=0.1), "no option 'attention_lr_mul'; is it 'attention_lr_mult'"),
        (dict(bank_lr_mult='high'), "bank_lr_mult .* or 'compensated', got 'high'"),
        (dict(attention_decay_mult=True), 'attention_decay_mult .*got True'),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ODConvOptimWrapperConstructor(
            Config(dict(optimizer=dict(type='SGD', lr=RATE))), paramwise_cfg=options
        )
