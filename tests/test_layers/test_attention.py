import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from mmdet_odconv import ODConv2d, set_temperature
from mmdet_odconv.layers import ODAttention


def two_layers():
    return nn.Sequential(ODConv2d(4, 4, 3), nn.ReLU(), ODConv2d(4, 4, 1))


@pytest.mark.parametrize(
    ('channels', 'reduction', 'width'),
    [(16, 1 / 16, 16), (512, 1 / 16, 32), (511, 1 / 16, 31), (64, 0.5, 32)],
)
def test_width_of_the_branch(channels, reduction, width):
    attention = ODAttention(channels, 8, (3, 3), reduction=reduction)
    assert attention.fc.weight.shape == (width, channels, 1, 1)


def test_attentions_that_are_identically_one_are_absent():
    x = torch.randn(2, 8, 4, 4)
    full = ODAttention(8, 16, (3, 3))(x)
    assert [tuple(a.shape) for a in full] == [(2, 8), (2, 16), (2, 9), (2, 4)]
    assert ODAttention(8, 8, (3, 3), groups=8)(x).filter is None
    assert ODAttention(8, 8, (3, 3), groups=4)(x).filter is not None
    assert ODAttention(8, 16, (1, 1))(x).spatial is None
    assert ODAttention(8, 16, (3, 3), kernel_num=1)(x).kernel is None


def test_set_temperature_reaches_every_layer():
    model = two_layers()
    assert set_temperature(nn.ModuleDict({'wrapped': model}), 12.0) == 2
    assert model[0].temperature == model[2].temperature == 12.0
    assert set_temperature(nn.Conv2d(1, 1, 1), 12.0) == 0
    with pytest.raises(ValueError, match='got -1'):
        set_temperature(model, -1)


def test_temperature_changes_the_output():
    layer = ODConv2d(4, 4, 3, attention_init='published').eval()
    x = torch.randn(2, 4, 6, 6)
    hot = layer(x)
    set_temperature(layer, 30.0)
    assert not torch.allclose(hot, layer(x))


def test_temperature_travels_with_the_state_dict():
    model = two_layers()
    set_temperature(model, 17.5)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = two_layers()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other[0].temperature == other[2].temperature == 17.5


def test_a_state_dict_without_a_temperature_leaves_it():
    model = two_layers()
    set_temperature(model, 17.5)
    published = {k: v for k, v in two_layers().state_dict().items() if 'temperature' not in k}
    assert len(published) == len(model.state_dict()) - 2
    model.load_state_dict(published, strict=True)
    assert model[0].temperature == 17.5


def test_copies_and_pickles_keep_the_temperature():
    model = two_layers()
    set_temperature(model, 3.0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[2].temperature == 3.0


def test_sharing_memory_between_processes_moves_no_head_out_of_it():
    attention = ODAttention(8, 16, (3, 3))
    attention.share_memory()
    assert all(parameter.is_shared() for parameter in attention.parameters())


def test_mixed_precision_leaves_the_branch_alone():
    attention = ODAttention(8, 16, (3, 3), attention_init='published').eval()
    x = torch.randn(2, 8, 4, 4)
    expected = attention(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        torch.testing.assert_close(attention(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize('norm_cfg', [dict(type='GN', num_groups=4), dict(type='LN'), None])
def test_norms_without_a_batch_do_not_mix_samples(norm_cfg):
    attention = ODAttention(8, 8, (3, 3), norm_cfg=norm_cfg, attention_init='published')
    x = torch.randn(3, 8, 4, 4)
    together = attention.train()(x).channel
    alone = torch.cat([attention(sample[None]).channel for sample in x])
    torch.testing.assert_close(together, alone)


def test_synchronised_batch_norm_can_be_converted_and_reverted():
    from mmengine.model import revert_sync_batchnorm

    model = nn.SyncBatchNorm.convert_sync_batchnorm(two_layers())
    assert isinstance(model[0].attention.bn, nn.SyncBatchNorm)
    model = revert_sync_batchnorm(model)
    assert model(torch.randn(2, 4, 6, 6)).shape == (2, 4, 4, 4)


def test_a_models_init_cfg_for_all_convolutions_leaves_the_branch():
    from mmengine.model import BaseModule

    class Model(BaseModule):
        def __init__(self):
            super().__init__(init_cfg=dict(type='Kaiming', layer='Conv2d'))
            self.plain = nn.Conv2d(4, 4, 3)
            self.conv = ODConv2d(4, 4, 3)

    model = Model()
    model.init_weights()
    assert not model.conv.attention.channel_fc.weight.any()
    assert model.conv.attention.channel_fc.bias.eq(2.2).all()


@pytest.mark.parametrize(
    ('batch', 'norm', 'warned'),
    [(2, 'BN', True), (3, 'BN', True), (4, 'BN', False), (2, 'LN', False)],
)
def test_a_batchnorm_over_few_values_warns(batch, norm, warned):
    layer = ODConv2d(4, 4, 3, norm_cfg=dict(type=norm))
    x = torch.randn(batch, 4, 6, 6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        layer(x)
        layer.eval()(x)
    found = [str(w.message) for w in caught if 'two or three samples' in str(w.message)]
    assert len(found) == warned
