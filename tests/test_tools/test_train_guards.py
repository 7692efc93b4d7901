"""Every training by tools/train.py has the hooks of docs/reliability.md."""

import importlib.util

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook

from tests.conftest import ROOT

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


def test_a_runner_of_another_kind_keeps_its_hooks():
    assert guarded(runner_type='FlexibleRunner') == dict(runner_type='FlexibleRunner')


def test_weights_without_the_state_of_a_training_are_not_resumed_from(tmp_path):
    torch.save(dict(state_dict={}, meta={}), tmp_path / 'weights.pth')
    with pytest.raises(SystemExit, match=r'weights\.pth has weights but not the state of a train'):
        TOOL.resume(Config(), str(tmp_path / 'weights.pth'))
