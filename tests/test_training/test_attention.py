import json

import pytest
import torch
import torch.distributed as dist
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import Runner
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdet_odconv import ODConv2d, ODConvAttentionHook
from mmdet_odconv.analysis import attention_statistics
from tests.test_training.test_temperature import IMAGES, Images


def conv(**kwargs):
    """With a LayerNorm the attentions are the same in training and testing."""
    args = dict(attention_init='published', norm_cfg=dict(type='LN')) | kwargs
    return ODConv2d(4, 4, 3, padding=1, **args)


class Model(BaseModel):
    """Records in which iterations its layer is watched."""

    def __init__(self, conv, block=None):
        super().__init__()
        self.conv = conv
        self.block = block or (lambda x: self.conv(x))
        self.watched = []

    def forward(self, inputs, mode='loss'):
        self.watched.append(bool(getattr(self.conv, 'attention', self.conv)._forward_hooks))
        return {'loss': self.block(inputs.requires_grad_()).square().mean()}


def run(work_dir, model, iters=6, batch=IMAGES, hooks=(), optim=None, **hook):
    runner = Runner(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=Images(),
            batch_size=batch,
            sampler=dict(type='InfiniteSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=False, max_iters=iters),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.0)) | (optim or {}),
        custom_hooks=[
            dict(type='ODConvAttentionHook', **dict(interval=3, images=2) | hook),
            *hooks,
        ],
        default_hooks=dict(checkpoint=None, logger=dict(type='LoggerHook', interval=1)),
        default_scope='mmengine',
        experiment_name=f'{work_dir.parent.name}-{work_dir.name}',
    )
    runner.train()
    return runner


def logged(runner):
    """The hook's scalars, each as the values of its looks."""
    scalars = runner.message_hub.log_scalars.items()
    return {
        name.removeprefix('train/'): list(buffer.data[0])
        for name, buffer in scalars
        if 'odconv_' in name
    }


def warnings_in(work_dir):
    log = next(work_dir.glob('*/*.log')).read_text().splitlines()
    return [line for line in log if 'ODConvAttentionHook: ' in line]


def images(numbers=range(IMAGES)):
    return torch.stack([Images()[n]['inputs'] for n in numbers])


def check_scalars(runner, model, numbers=range(IMAGES), looks=2):
    """The weights stay as they are (the rate is 0), so that they can be looked at afterwards."""
    (record,) = attention_statistics(model.conv, [images(numbers)])
    expected = {f'odconv_{name}_std': std for name, std in record.std.items()}
    expected['odconv_kernel_entropy'] = record.kernel_entropy
    expected['odconv_kernel_similarity'] = record.kernel_similarity
    expected['odconv_saturated'] = max(record.saturated.values())
    assert record.largest_std > 1e-3
    found = logged(runner)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values == pytest.approx([expected[name]] * looks, rel=1e-4), name


def test_it_logs_the_statistics_of_the_images_it_looked_at(tmp_path):
    model = Model(conv())
    check_scalars(run(tmp_path, model), model)
    assert model.watched == [False, False, True] * 2
    assert not model.conv.attention._forward_hooks
    assert not model._forward_hooks
    text = next(tmp_path.glob('*/*.log')).read_text()
    assert text.count('odconv_kernel_std: ') == 4  # from the third iteration on
    lines = [json.loads(x) for x in next(tmp_path.glob('*/vis_data/scalars.json')).open()]
    assert lines[-1].keys() >= {'odconv_kernel_std', 'odconv_saturated'}


def test_small_batches_are_put_together(tmp_path):
    model = Model(conv())
    runner = run(tmp_path, model, batch=2, iters=5, images=IMAGES)
    assert model.watched == [False, False, True, True, True]
    check_scalars(runner, model, looks=1)


def test_it_takes_layers_in_a_frozen_mode_as_they_are(tmp_path):
    model = Model(conv(norm_cfg=dict(type='BN')))
    model.conv.eval()
    model.conv.train = lambda mode=True: model.conv
    model.conv.requires_grad_(False)
    check_scalars(run(tmp_path, model), model)


@pytest.mark.parametrize('reentrant', [True, False])
def test_checkpointed_blocks_count_once(tmp_path, reentrant):
    layer = conv()
    model = Model(layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    # Counted twice, the two images of an iteration would be enough.
    runner = run(tmp_path, model, batch=2, iters=4, images=3)
    check_scalars(runner, model, numbers=[4, 5, 0, 1], looks=1)


def test_mixed_precision(tmp_path):
    layer = conv()

    def block(x):
        with torch.autocast('cpu', dtype=torch.bfloat16):
            return layer(x)

    model = Model(layer, block)
    check_scalars(run(tmp_path, model), model)


def test_a_wrapped_model(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/one', rank=0, world_size=1)
    try:
        model = Model(conv())
        check_scalars(run(tmp_path / 'run', MMDistributedDataParallel(module=model)), model)
        model = Model(conv(attention_init='zero'))
        run(tmp_path / 'static', MMDistributedDataParallel(module=model), warn_after=1)
    finally:
        dist.destroy_process_group()
    (warning,) = warnings_in(tmp_path / 'static')
    assert ': conv; docs' in warning


def test_scalars_of_each_layer_go_to_the_backends_alone(tmp_path):
    model = Model(conv())
    run(tmp_path, model, per_layer=True)
    lines = [json.loads(x) for x in next(tmp_path.glob('*/vis_data/scalars.json')).open()]
    of_layer = [line for line in lines if 'odconv_kernel_std/conv' in line]
    assert [line['step'] for line in of_layer] == [3, 6]
    (record,) = attention_statistics(model.conv, [images()])
    assert of_layer[0]['odconv_channel_std/conv'] == pytest.approx(record.std['channel'], rel=1e-4)
    assert 'odconv_kernel_std/conv' not in next(tmp_path.glob('*/*.log')).read_text()


def test_a_layer_that_does_not_move_is_named_once(tmp_path):
    model = Model(nn.Sequential(conv(), conv(attention_init='zero'), conv(attention_init='zero')))
    model.conv[2].requires_grad_(False)
    run(tmp_path, model.eval(), iters=12, warn_after=4)
    (warning,) = warnings_in(tmp_path)
    assert 'after 6 iterations' in warning
    assert 'hardly depend on the image' in warning
    assert ': conv.1, conv.2 (frozen); docs' in warning


def test_a_saturated_layer_is_named_once(tmp_path):
    layer = conv(attention_init='zero', attention_bias=50.0)
    run(tmp_path, Model(layer), iters=9, warn_after=3, min_std=0)
    (warning,) = warnings_in(tmp_path)
    assert 'saturated' in warning
    assert ': conv (channel, filter, spatial); docs' in warning


def test_healthy_layers_and_those_without_an_attention_are_not_named(tmp_path):
    static = conv(kernel_num=1, attentions=())
    run(tmp_path, Model(nn.Sequential(conv(), static)), iters=9, warn_after=1)
    assert not warnings_in(tmp_path)


def test_an_annealed_temperature_holds_the_attentions_together(tmp_path):
    annealed = dict(type='ODConvTemperatureHook', initial=1e6, anneal_iters=6)
    model = Model(conv(attention_init='zero'))
    run(tmp_path, model, iters=12, warn_after=1, hooks=[annealed])
    (warning,) = warnings_in(tmp_path)
    assert 'after 9 iterations' in warning


def test_a_layer_that_is_not_used(tmp_path):
    run(tmp_path, Model(conv(), nn.Conv2d(4, 4, 3)), iters=9)
    (warning,) = warnings_in(tmp_path)
    assert 'iteration 3 used none of the 1 ODConv layers' in warning


def test_a_model_without_odconv(tmp_path):
    runner = run(tmp_path, Model(nn.Conv2d(4, 4, 3)))
    (warning,) = warnings_in(tmp_path)
    assert 'no ODConv layer' in warning
    assert runner.iter == 6
    assert not logged(runner)


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (dict(interval=0), 'interval.*got 0'),
        (dict(images=1), 'images.*got 1'),
        (dict(min_std=-1), 'min_std.*got -1'),
        (dict(max_saturated=90), 'max_saturated.*got 90'),
        (dict(interval='often'), "interval must be an integer, got 'often'"),
        (dict(min_std='low'), "min_std must be a number, got 'low'"),
        (dict(warn_after=0.5), 'warn_after must be an integer, got 0.5'),
    ],
)
def test_bad_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        ODConvAttentionHook(**args)
