"""tools/test.py drops the EMA hook, however a config names it."""

import importlib.util

import pytest
from mmengine.config import Config
from mmengine.hooks import EMAHook

from tests.conftest import ROOT

SPEC = importlib.util.spec_from_file_location('test_tool', ROOT / 'tools/test.py')
TOOL = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TOOL)


class OwnEMAHook(EMAHook):
    """A subclass, as a project may have."""


@pytest.mark.parametrize('kind', ['EMAHook', 'mmengine.EMAHook', EMAHook, OwnEMAHook])
def test_every_form_of_the_ema_hook_is_dropped(kind):
    others = [dict(type='NumClassCheckHook'), dict(type='NoSuchHook')]
    config = Config(dict(custom_hooks=[others[0], dict(type=kind), others[1]]))
    TOOL.drop_ema(config)
    assert [dict(hook) for hook in config.custom_hooks] == others


def test_a_config_without_hooks_stays_without():
    config = Config(dict())
    TOOL.drop_ema(config)
    assert config.custom_hooks == []
