"""Parts of tools/test.py: it drops the EMA hook, and warns of other classes."""

import importlib.util
import logging
from types import SimpleNamespace

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


def warnings_of_classes(caplog, trained, tested):
    metainfo = dict(classes=tested)
    runner = SimpleNamespace(
        logger=logging.getLogger('test_tool'),
        test_dataloader=SimpleNamespace(dataset=SimpleNamespace(metainfo=metainfo)),
    )
    caplog.clear()
    TOOL.warn_of_classes(runner, dict(dataset_meta=dict(classes=trained)))
    return caplog.messages


@pytest.mark.parametrize('tested', [('dog', 'cat'), ('cat', 'horse'), ('cat',)])
def test_other_classes_than_those_of_the_training_are_warned_of(caplog, tested):
    (message,) = warnings_of_classes(caplog, ('cat', 'dog'), tested)
    assert 'trained for the classes (cat, dog)' in message
    assert f'test_dataloader has ({", ".join(tested)})' in message


@pytest.mark.parametrize(
    ('trained', 'tested'), [(('cat', 'dog'), ['cat', 'dog']), (None, ('cat',)), (('cat',), None)]
)
def test_the_same_classes_or_unknown_ones_are_not_warned_of(caplog, trained, tested):
    assert not warnings_of_classes(caplog, trained, tested)
