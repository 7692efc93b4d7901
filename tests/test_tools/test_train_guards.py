"""What tools/train.py adds to a config for docs/reliability.md, and what it warns of."""

import importlib.util
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from torch import nn

from mmdet_odconv import ODConv2d, compat
from tests.conftest import ROOT
from tests.test_safe_running.test_reading import Hostile

SPEC = importlib.util.spec_from_file_location('train_tool', ROOT / 'tools/train.py')
TOOL = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TOOL)

NON_FINITE, PREEMPTION = dict(type='NonFiniteHook'), dict(type='PreemptionHook')


def guarded(**config):
    config = Config(config)
    TOOL.add_guards(config)
    return config._cfg_dict.to_dict()


@pytest.mark.parametrize('kind', ['CheckpointHook', 'mmengine.CheckpointHook', CheckpointHook])
def test_the_checkpoint_hook_keeps_its_options(kind):
    checkpoint = dict(type=kind, interval=3, save_best='auto')
    config = guarded(default_hooks=dict(checkpoint=checkpoint), custom_hooks=[dict(type='EMAHook')])
    assert config['default_hooks']['checkpoint'] == checkpoint | dict(type='SafeCheckpointHook')
    assert config['custom_hooks'] == [dict(type='EMAHook'), NON_FINITE, PREEMPTION]


def test_a_config_without_hooks_gets_them():
    config = guarded()
    assert config['default_hooks']['checkpoint'] == dict(type='SafeCheckpointHook', interval=1)
    assert config['custom_hooks'] == [NON_FINITE, PREEMPTION]


def test_what_the_config_says_stays():
    own = [dict(type='NonFiniteHook', action='skip'), dict(type='PreemptionHook', exit_code=85)]
    config = guarded(custom_hooks=own, default_hooks=dict(checkpoint=dict(type='MyHook')))
    assert config['custom_hooks'] == own
    assert config['default_hooks']['checkpoint'] == dict(type='MyHook')


@pytest.mark.parametrize('checkpoint', [None, dict(type='MyHook')])
def test_without_its_checkpoint_hook_sigterm_is_left_alone(checkpoint):
    config = guarded(default_hooks=dict(checkpoint=checkpoint))
    assert config['default_hooks']['checkpoint'] == checkpoint
    assert config['custom_hooks'] == [NON_FINITE]


def test_custom_hooks_that_are_no_list_are_named():
    with pytest.raises(SystemExit, match=r'^custom_hooks must be a list of hooks, got '):
        guarded(custom_hooks=dict(type='EMAHook'))


@pytest.mark.parametrize(
    'config',
    [dict(custom_hooks=['EMAHook']), dict(default_hooks=dict(checkpoint=dict(interval=2)))],
)
def test_a_hook_without_a_type_is_named(config):
    with pytest.raises(SystemExit, match=r'^a hook must be a dict with a type, got .*(EMA|2)'):
        guarded(**config)


def test_a_runner_of_another_kind_keeps_its_hooks():
    assert guarded(runner_type='FlexibleRunner') == dict(runner_type='FlexibleRunner')


def test_a_run_goes_on_with_its_seed_after_one_reading(tmp_path, monkeypatch):
    model, path = nn.Linear(2, 2), tmp_path / 'epoch_1.pth'
    meta = dict(seed=3, epoch=1, iter=3)
    torch.save(dict(state_dict=model.state_dict(), optimizer={}, meta=meta), path)
    runner = SimpleNamespace(model=nn.Linear(2, 2))
    monkeypatch.setattr(TOOL.cli, 'build_runner', lambda config: runner)
    readings, load = [], compat._torch_load
    monkeypatch.setattr(
        compat, '_torch_load', lambda file, **kwargs: readings.append(file) or load(file, **kwargs)
    )
    config = Config(dict(work_dir=str(tmp_path), train_dataloader={}))
    assert TOOL.checked_runner(config, 'auto') is runner
    assert readings == [path]
    assert (config.resume, config.load_from) == (True, str(path))
    assert config.randomness.seed == 3
    assert torch.equal(runner.model.weight, model.weight)


def test_a_run_among_the_checkpoints_of_another_is_warned_of(tmp_path, monkeypatch, caplog):
    runner = SimpleNamespace(model=nn.Linear(2, 2), logger=logging.getLogger('anew'))
    monkeypatch.setattr(TOOL.cli, 'build_runner', lambda config: runner)
    config = Config(dict(work_dir=str(tmp_path), train_dataloader={}))
    TOOL.checked_runner(config, None)
    assert not caplog.messages
    (tmp_path / 'last_checkpoint').write_text('epoch_1.pth')
    TOOL.checked_runner(config, None)
    (message,) = caplog.messages
    assert 'has checkpoints of an earlier run' in message


def test_a_runner_of_another_kind_goes_on_from_folders_but_from_no_strangers_file(tmp_path):
    config = Config(dict(runner_type='FlexibleRunner', work_dir=str(tmp_path)))
    (tmp_path / 'epoch_1').mkdir()
    TOOL.resume_own(config, str(tmp_path / 'epoch_1'))
    assert (config.resume, config.load_from) == (True, str(tmp_path / 'epoch_1'))
    path, proof = tmp_path / 'epoch_1.pth', tmp_path / 'proof'
    torch.save(dict(state_dict=dict(a=Hostile(proof))), path)
    (tmp_path / 'last_checkpoint').write_text(str(path))
    for given in ('auto', str(path)):
        with pytest.raises(SystemExit, match=r'epoch_1\.pth cannot .*nothing of it was run'):
            TOOL.resume_own(config, given)
    assert not proof.exists()


def warnings_of_batch_size(caplog, batch_size, processes=1, counts=1, **scaling):
    runner = SimpleNamespace(logger=logging.getLogger('train_guards'), world_size=processes)
    config = dict(
        auto_scale_lr=scaling,
        optim_wrapper=dict(accumulative_counts=counts),
        train_dataloader=dict(batch_size=batch_size) if batch_size else dict(batch_sampler={}),
    )
    caplog.clear()
    TOOL.warn_of_batch_size(runner, Config(config))
    return caplog.messages


def test_a_rate_meant_for_quite_another_batch_is_warned_of(caplog):
    for batch_size, processes, counts, step in ((2, 1, 1, 2), (2, 3, 1, 6), (2, 8, 4, 64)):
        (message,) = warnings_of_batch_size(
            caplog, batch_size, processes, counts, base_batch_size=16
        )
        assert 'meant for 16 images a step' in message
        assert f'but a step has {step} here: add --auto-scale-lr' in message


@pytest.mark.parametrize(
    'scaling', [dict(), dict(enable=False), dict(enable=True, base_batch_size=16)]
)
def test_a_rate_that_is_scaled_or_meant_for_no_batch_is_not_warned_of(caplog, scaling):
    assert not warnings_of_batch_size(caplog, 2, **scaling)


@pytest.mark.parametrize(
    ('batch_size', 'processes', 'counts'), [(2, 8, 1), (2, 4, 1), (4, 4, 2), (None, 1, 1)]
)
def test_a_batch_of_about_the_size_is_not_warned_of(caplog, batch_size, processes, counts):
    assert not warnings_of_batch_size(caplog, batch_size, processes, counts, base_batch_size=16)


@pytest.mark.parametrize(
    ('optimizer', 'paramwise', 'layer', 'warned'),
    [
        ('SGD', None, ODConv2d, True),
        (torch.optim.SGD, dict(norm_decay_mult=0), ODConv2d, True),
        ('SGD', dict(attention_lr_mult=0.1), ODConv2d, False),
        ('SGD', dict(custom_keys={'attention': dict(lr_mult=0.1)}), ODConv2d, False),
        ('AdamW', None, ODConv2d, False),
        ('SGD', None, nn.Conv2d, False),
    ],
)
def test_attentions_at_the_full_rate_of_sgd_are_warned_of(
    caplog, optimizer, paramwise, layer, warned
):
    runner = SimpleNamespace(logger=logging.getLogger('rates'), model=nn.Sequential(layer(2, 4, 3)))
    wrapper = dict(optimizer=dict(type=optimizer), paramwise_cfg=paramwise)
    TOOL.warn_of_rates(runner, Config(dict(optim_wrapper=wrapper)))
    assert bool(caplog.messages) == warned


WARM_UP = dict(type='LinearLR', by_epoch=False, end=500)
COSINE = dict(type='CosineAnnealingLR', T_max=20, end=20)


@pytest.mark.parametrize(
    ('schedulers', 'loop', 'warned'),
    [
        ([WARM_UP, COSINE], dict(max_epochs=60), 'a schedule of 20 epochs .*training has 60'),
        ([WARM_UP, COSINE], dict(max_epochs=1), 'a schedule of 20 epochs .*training has 1 '),
        ([WARM_UP, COSINE], dict(max_epochs=20), None),
        ([WARM_UP], dict(max_epochs=20), None),
        (COSINE, dict(max_epochs=12), 'a schedule of 20 epochs'),
        ([WARM_UP, dict(COSINE, by_epoch=False)], dict(max_iters=900), 'a schedule of 500 iters'),
        (None, dict(max_epochs=20), None),
        ([dict(type='MultiStepLR', milestones=[8, 11])], dict(max_epochs=12), None),
    ],
)
def test_a_schedule_of_another_length_than_the_training_is_warned_of(
    caplog, schedulers, loop, warned
):
    runner = SimpleNamespace(logger=logging.getLogger('schedule'))
    TOOL.warn_of_schedule(runner, Config(dict(param_scheduler=schedulers, train_cfg=loop)))
    assert bool(caplog.messages) == bool(warned)
    assert warned is None or re.search(warned, caplog.text)


def test_weights_without_the_state_of_a_training_are_not_resumed_from(tmp_path):
    torch.save(dict(state_dict={}, meta={}), tmp_path / 'weights.pth')
    with pytest.raises(SystemExit, match=r'weights\.pth has weights but not the state of a train'):
        TOOL.resume(Config(), str(tmp_path / 'weights.pth'))
