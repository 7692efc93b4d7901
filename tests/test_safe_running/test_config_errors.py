import copy
import functools

import pytest
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, PARAM_SCHEDULERS
from mmengine.runner import Runner
from torch import nn

from mmdet_odconv import cli
from tests.conftest import ROOT

CONFIG = str(ROOT / 'configs/odconv/retinanet_od_r18_shapes.py')
whole = functools.cache(lambda: cli.load_config(CONFIG))


@pytest.fixture
def _runner_is_its_model(monkeypatch):
    """A whole runner takes seconds, most of them for a description of the machine."""
    register_all_modules()
    monkeypatch.setattr(Runner, 'from_cfg', lambda config: MODELS.build(config.model))


@pytest.mark.usefixtures('_runner_is_its_model')
@pytest.mark.parametrize(
    ('option', 'value', 'message'),
    [
        ('kernel_num', 'four', "kernel_num must be an integer, got 'four'"),
        ('kernel_num', 2.5, 'kernel_num must be an integer, got 2.5'),
        ('odconv_cfg', dict(strategy='best'), "strategy must be .*, got 'best'"),
    ],
)
def test_a_wrong_argument_of_a_backbone_ends_in_one_sentence(tmp_path, option, value, message):
    config = copy.deepcopy(whole())
    config.model.backbone[option] = value
    config.work_dir = str(tmp_path)
    with pytest.raises(SystemExit, match=f'^OD(Attention|Conv2d): {message}'):
        cli.build_runner(config)


@pytest.mark.usefixtures('_runner_is_its_model')
@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(type='RetinaNett'), 'RetinaNett is not in the .*model registry'),
        (dict(backbon=dict(depth=18)), "RetinaNet.* unexpected keyword argument 'backbon'"),
        (dict(bbox_head=dict(num_clases=5)), ".* unexpected keyword argument 'num_clases'"),
        (dict(backbone=dict(depth=19)), 'invalid depth 19 for resnet'),
    ],
)
def test_a_wrong_name_in_a_config_ends_in_one_sentence(tmp_path, changes, message):
    config = copy.deepcopy(whole())
    config.merge_from_dict(dict(model=changes, work_dir=str(tmp_path)))
    with pytest.raises(SystemExit, match=rf'retinanet_od_r18_shapes\.py: {message}'):
        cli.build_runner(config)


def test_an_unknown_scheduler_is_named():
    config = copy.deepcopy(whole())
    with (
        pytest.raises(SystemExit, match=r'LinerLR is not in the .*parameter scheduler registry'),
        cli.config_errors_as_exit(config),
    ):
        PARAM_SCHEDULERS.build(dict(type='LinerLR'))


@pytest.mark.parametrize(
    ('registry', 'built', 'message'),
    [
        (HOOKS, dict(type='NonFiniteHook', max_skips=0), 'NonFiniteHook: max_skips must be'),
        (HOOKS, dict(type='ODConvTemperatureHook', initial=0), 'ODConvTemperatureHook: initial'),
        (
            MODELS,
            dict(type='ODConvModel', report='all'),
            r'\S+/retinanet_od_r18_shapes\.py: report',
        ),
    ],
)
def test_a_refused_argument_names_its_owner(registry, built, message):
    config = copy.deepcopy(whole())
    with pytest.raises(SystemExit, match=f'^{message}'), cli.config_errors_as_exit(config):
        registry.build(built)


def test_an_unknown_norm_of_the_attention_is_named():
    config = copy.deepcopy(whole())
    config.model.backbone.odconv_cfg = dict(norm_cfg=dict(type='Ln'))
    message = r"there is no layer 'Ln'"
    with pytest.raises(SystemExit, match=message), cli.config_errors_as_exit(config):
        MODELS.build(config.model)


def test_an_unknown_optimizer_is_named():
    config = cli.load_config(CONFIG, {'optim_wrapper.optimizer.type': 'AdamX'})
    message = r"there is no optimizer 'AdamX'"
    with pytest.raises(SystemExit, match=message), cli.config_errors_as_exit(config):
        build_optim_wrapper(nn.Linear(2, 2), config.optim_wrapper)
    config.optim_wrapper.constructor = 'ODConvOptimWrapperConstructor'
    with pytest.raises(SystemExit, match=message), cli.config_errors_as_exit(config):
        build_optim_wrapper(nn.Linear(2, 2), config.optim_wrapper)


@pytest.mark.parametrize('error', [KeyError('x'), TypeError('f() takes no arguments')])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)), cli.config_errors_as_exit(copy.deepcopy(whole())):
        raise error


@pytest.mark.usefixtures('_runner_is_its_model')
@pytest.mark.parametrize(
    ('argument', 'value', 'message'),
    [
        ('include', 'backbone.stage5', 'include .*near names: backbone.stage4'),
        ('kernel_nums', 4, "there is no argument 'kernel_nums'; is it 'kernel_num'"),
        ('kernel_num', 0, 'kernel_num must be at least 1, got 0'),
        ('kernel_num', 'four', "kernel_num must be an integer, got 'four'"),
        ('min_channels', 'all', "min_channels must be an integer, got 'all'"),
    ],
)
def test_a_wrong_argument_of_the_conversion_ends_in_one_sentence(
    tmp_path, argument, value, message
):
    config = cli.load_config(str(ROOT / 'configs/odconv/yolox_od_cspdarknet-tiny.py'))
    config.model.odconv[argument] = value
    config.work_dir = str(tmp_path)
    with pytest.raises(SystemExit, match=rf'^model\.odconv: {message}'):
        cli.build_runner(config)
