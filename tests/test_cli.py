import argparse
import pickle
import re
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.model import BaseModule, MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, PARAM_SCHEDULERS
from mmengine.runner import CheckpointLoader
from torch import nn

from mmdet_odconv import ODConv2d, cli
from tests.conftest import ROOT

CONFIG = str(ROOT / 'configs/odconv/retinanet_od_r18_shapes.py')


def test_a_typo_in_a_path_is_answered_with_near_names():
    with pytest.raises(SystemExit) as error:
        cli.load_config(CONFIG.replace('r18', 'r81'))
    message = str(error.value)
    assert message.startswith('config not found: ')
    assert f'is it {CONFIG}' in message


def test_paths_with_a_scheme_are_left_to_mmengine():
    cli.require_file('https://example.org/weights.pth', 'checkpoint')


def test_a_relative_path_is_said_once_with_the_folder_it_was_looked_for_in(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path, times in (('weights.pth', 1), (str(tmp_path / 'weights.pth'), 1)):
        with pytest.raises(SystemExit) as error:
            cli.require_file(path, 'checkpoint')
        assert str(error.value).count(str(tmp_path)) == times


def test_a_folder_of_deepspeed_says_how_to_make_a_file(tmp_path):
    (tmp_path / 'zero_to_fp32.py').touch()
    with pytest.raises(SystemExit, match=r'is a folder, .*DeepSpeed; .python \S+zero_to_fp32\.py'):
        cli.require_file(str(tmp_path), 'checkpoint')


def test_a_work_folder_in_place_of_its_checkpoint_names_it(tmp_path):
    (tmp_path / 'epoch_3.pth').touch()
    with pytest.raises(SystemExit, match=rf'is a folder, .* is it {tmp_path}/epoch_3\.pth'):
        cli.require_file(str(tmp_path), 'checkpoint')


def test_overrides_are_merged_and_bad_ones_refused():
    config = cli.load_config(CONFIG, {'model.backbone.kernel_num': 2})
    assert config.model.backbone.kernel_num == 2
    with pytest.raises(SystemExit, match=r'--cfg-options .*does not fit'):
        cli.load_config(CONFIG, {'train_dataloader.dataset.pipeline.77.scale': 3})


@pytest.mark.parametrize(
    ('option', 'right'),
    [
        ('train_cfg.max_epoch', 'train_cfg.max_epochs'),
        ('model.backbon.depth', 'model.backbone.depth'),
        ('model.bbox_head.num_clases', 'model.bbox_head.num_classes'),
        ('ramdomness.seed', 'randomness.seed'),
    ],
)
def test_an_override_that_is_nearly_a_key_is_refused(option, right):
    with pytest.raises(SystemExit, match=rf'^--cfg-options {option}: .* is it {right}\?$'):
        cli.load_config(CONFIG, {option: 1})


def test_new_keys_can_be_set():
    options = {'model.backbone.with_cp': True, 'randomness.seed': 1, 'own_variable': 2}
    config = cli.load_config(CONFIG, options)
    assert (config.model.backbone.with_cp, config.randomness.seed) == (True, 1)


def test_an_override_without_a_value_is_refused(capsys):
    parser = argparse.ArgumentParser()
    cli.add_config_options(parser)
    with pytest.raises(SystemExit) as error:
        parser.parse_args(['--cfg-options', 'train_cfg.max_epochs'])
    assert error.value.code == 2
    assert "takes key=value, got 'train_cfg.max_epochs'" in capsys.readouterr().err


def test_a_missing_base_is_named(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text("_base_ = 'mmdet::yolox/yolox_tinny.py'")
    with pytest.raises(SystemExit, match=r'config\.py: .*yolox_tinny\.py'):
        cli.load_config(str(path))


def test_a_base_of_a_package_that_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr('mmengine.config.config.is_installed', lambda package: package == 'mmdet')
    with pytest.raises(SystemExit, match=r'mmpretrain is not .* -r requirements/pretrain\.txt$'):
        cli.load_config(str(ROOT / 'configs/pretrain/od_r18_shapes.py'))


def test_a_config_with_an_error_of_syntax_is_named(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text('model = dict(')
    with pytest.raises(SystemExit, match=r'config\.py'):
        cli.load_config(str(path))


@pytest.mark.parametrize('line', ['x = clases', "_base_ = './base.py'\nx = _base_.model.nekk"])
def test_a_config_that_does_not_run_is_named(tmp_path, line):
    (tmp_path / 'base.py').write_text('model = dict()')
    path = tmp_path / 'config.py'
    path.write_text(line)
    with pytest.raises(SystemExit, match=rf'^{path}: (Name|Attribute)Error: .*(clases|nekk)'):
        cli.load_config(str(path))


@pytest.mark.parametrize(
    ('line', 'right'),
    [
        ('train_dataloder = dict(batch_size=2)', 'train_dataloader'),
        ('optim_wraper = dict()', 'optim_wrapper'),
        ('custom_hook = []', 'custom_hooks'),
    ],
)
def test_a_misspelt_key_of_a_config_is_refused(tmp_path, line, right):
    path = tmp_path / 'config.py'
    path.write_text(f"_base_ = '{CONFIG}'\n{line}\n")
    wrong = line.split()[0]
    with pytest.raises(
        SystemExit, match=f"{path}, line 2: no part of a training reads '{wrong}'; is it {right}"
    ):
        cli.load_config(str(path))


def test_names_of_the_user_are_no_misspelt_keys(tmp_path):
    path = tmp_path / 'config.py'
    lines = [f"_base_ = '{CONFIG}'", 'custom_hook = dict(type="NonFiniteHook")', 'foo = 1']
    path.write_text('\n'.join([*lines, 'custom_hooks = [custom_hook]']))
    assert len(cli.load_config(str(path)).custom_hooks) == 1


def test_a_part_of_other_configs_is_no_config_of_a_training(tmp_path):
    path = tmp_path / 'part.py'
    path.write_text('model = dict(type="RetinaNet")\ntrain_cfg = dict(max_epochs=1)')
    args = argparse.Namespace(
        config=str(path), cfg_options=None, work_dir=None, launcher='none', local_rank=0
    )
    with pytest.raises(SystemExit, match=r'part\.py has no train_dataloader and no optim_wrapper$'):
        cli.runner_config(args, 'train_dataloader', 'train_cfg', 'optim_wrapper')


def test_a_work_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / 'file').touch()
    config = Config(dict(work_dir=str(tmp_path / 'file/work')))
    with pytest.raises(SystemExit, match=r'work folder \S+/file/work cannot be written \(Not a'):
        cli.build_runner(config)


@pytest.fixture
def _runner_is_its_model(monkeypatch):
    """A whole runner takes seconds, most of them for a description of the machine."""
    register_all_modules()
    monkeypatch.setattr(cli.Runner, 'from_cfg', lambda config: MODELS.build(config.model))


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
    config = cli.load_config(CONFIG)
    config.model.backbone[option] = value
    config.work_dir = str(tmp_path)
    with pytest.raises(SystemExit, match=f'^the ODConv layers of the config: {message}'):
        cli.build_runner(config)


@pytest.fixture
def several_processes(tmp_path, monkeypatch):
    """A config for the only process of a distributed run, and no GPU."""
    register_all_modules()
    monkeypatch.setattr(cli, 'get_device', lambda: 'cpu')
    address = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT='0', RANK='0', WORLD_SIZE='1')
    for name, value in (address | dict(LOCAL_RANK='0')).items():
        monkeypatch.setenv(name, value)
    config = cli.load_config(CONFIG)
    config.launcher, config.work_dir = 'pytorch', str(tmp_path)
    yield config
    if dist.is_initialized():
        dist.destroy_process_group()


def test_processes_without_a_gpu_are_told_how_to_use_cpus(several_processes):
    with pytest.raises(
        SystemExit, match=r'has no GPU .* env_cfg\.dist_cfg\.backend=gloo uses CPUs'
    ):
        cli.build_runner(several_processes)


@pytest.mark.parametrize(
    ('launcher', 'variable', 'starter'),
    [('pytorch', 'RANK', 'torchrun'), ('slurm', 'SLURM_PROCID', 'srun')],
)
def test_a_launcher_that_did_not_start_the_process_is_named(
    several_processes, monkeypatch, launcher, variable, starter
):
    monkeypatch.delenv(variable, raising=False)
    several_processes.launcher = launcher
    with pytest.raises(SystemExit, match=f'--launcher {launcher} .* by {starter}.* no {variable}$'):
        cli.build_runner(several_processes)


def test_processes_train_on_cpus(several_processes):
    several_processes.env_cfg.dist_cfg = dict(backend='gloo', timeout=60)
    choose = torch.cuda.set_device
    runner = cli.build_runner(several_processes)
    assert isinstance(runner.model, MMDistributedDataParallel)
    assert runner.model.device_ids is None
    assert dist.get_backend() == 'gloo'
    assert torch.cuda.set_device is choose


@pytest.mark.usefixtures('_runner_is_its_model')
@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(type='RetinaNett'), "there is no model 'RetinaNett'; is it RetinaNet"),
        (dict(backbon=dict(depth=18)), "RetinaNet has no argument 'backbon'; is it backbone"),
        (
            dict(bbox_head=dict(num_clases=5)),
            "AnchorHead has no argument 'num_clases'; is it num_c",
        ),
        (dict(backbone=dict(depth=19)), 'invalid depth 19 for resnet'),
    ],
)
def test_a_wrong_name_in_a_config_ends_in_one_sentence(tmp_path, changes, message):
    config = cli.load_config(CONFIG)
    config.merge_from_dict(dict(model=changes, work_dir=str(tmp_path)))
    with pytest.raises(SystemExit, match=rf'retinanet_od_r18_shapes\.py: {message}'):
        cli.build_runner(config)


def test_an_unknown_scheduler_is_named():
    config = cli.load_config(CONFIG)
    with (
        pytest.raises(SystemExit, match="no parameter scheduler 'LinerLR'; is it LinearLR"),
        cli.mistakes_in_one_sentence(config),
    ):
        PARAM_SCHEDULERS.build(dict(type='LinerLR'))


@pytest.mark.parametrize('constructor', ['Default', 'ODConv'])
@pytest.mark.parametrize('option', ['lr', 'weight_decay'])
def test_text_in_place_of_a_number_of_the_optimizer_is_named(constructor, option):
    key = f'optim_wrapper.optimizer.{option}'
    config = cli.load_config(CONFIG, {key: 'fast'})
    config.optim_wrapper.constructor = f'{constructor}OptimWrapperConstructor'
    message = rf"retinanet_od_r18_shapes\.py: {key} must be a number, got 'fast'$"
    with pytest.raises(SystemExit, match=message), cli.mistakes_in_one_sentence(config):
        build_optim_wrapper(ODConv2d(2, 2, 3), config.optim_wrapper)


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
    config = cli.load_config(CONFIG)
    with pytest.raises(SystemExit, match=f'^{message}'), cli.mistakes_in_one_sentence(config):
        registry.build(built)


def test_an_unknown_optimizer_is_named():
    config = cli.load_config(CONFIG, {'optim_wrapper.optimizer.type': 'AdamX'})
    message = r"there is no optimizer 'AdamX'; is it Adam"
    with pytest.raises(SystemExit, match=message), cli.mistakes_in_one_sentence(config):
        build_optim_wrapper(nn.Linear(2, 2), config.optim_wrapper)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            dict(neck=dict(in_channels=[16, 32, 64, 64])),
            r'model\.neck\.lateral_convs\.3\.conv takes 64 channels, but its input has 128; '
            r'check the in_channels of model\.neck$',
        ),
        (
            dict(neck=dict(in_channels=[16, 32, 64, 64], conv_cfg=dict(type='ODConv'))),
            r'model\.neck\.lateral_convs\.3\.conv takes 64 channels, but its input has 128; ',
        ),
        (
            dict(bbox_head=dict(in_channels=99)),
            r'model\.bbox_head\.\S+ takes 99 channels, .* the in_channels of model\.bbox_head$',
        ),
        (
            dict(neck=dict(in_channels=[16, 32, 64])),
            r'FPN refuses what it is given: assert len\(inputs\) == len\(self\.in_channels\)$',
        ),
    ],
)
def test_parts_that_do_not_fit_each_other_end_in_one_sentence(changes, message):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    register_all_modules()
    config = cli.load_config(CONFIG)
    config.merge_from_dict(dict(model=changes))
    detector = MODELS.build(config.model).eval()
    for model in (detector, Wrapper(detector)):
        with (
            pytest.raises(SystemExit, match=rf'retinanet_od_r18_shapes\.py: {message}'),
            cli.mistakes_in_one_sentence(config),
        ):
            model(torch.rand(2, 3, 64, 64), mode='tensor')


@pytest.mark.parametrize('error', [KeyError('x'), TypeError('f() takes no arguments')])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)), cli.mistakes_in_one_sentence(cli.load_config(CONFIG)):
        raise error


def test_a_detector_is_not_loaded_where_it_cannot_run(tmp_path):
    config = cli.load_config(CONFIG)
    with pytest.raises(SystemExit, match=r'^--device gpu cannot be used: '):
        cli.load_detector(config, str(tmp_path / 'a.pth'), 'gpu')
    with pytest.raises(SystemExit, match=r'^checkpoint not found: '):
        cli.load_detector(config, str(tmp_path / 'a.pth'))


def test_a_result_is_not_computed_that_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match='is a folder, where a file is to be written'):
        cli.require_new_file(str(tmp_path), force=True)
    monkeypatch.setattr(
        cli.tempfile, 'TemporaryFile', mock.Mock(side_effect=PermissionError(13, 'No'))
    )
    with pytest.raises(SystemExit, match=r'a\.json cannot be written \(No\)$'):
        cli.require_new_file(str(tmp_path / 'a.json'), force=False)


@pytest.mark.parametrize('text', ['0', '-3', 'two', '1.5'])
def test_a_count_is_a_whole_number_of_at_least_one(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f'at least 1, got {text}'):
        cli.positive(text)


class Start(BaseModule):
    def __init__(self, checkpoint, **attributes):
        super().__init__()
        self.backbone = BaseModule(dict(type='Pretrained', checkpoint=checkpoint))
        for name, value in attributes.items():
            setattr(self.backbone, name, value)


def test_weights_that_cannot_be_had_name_the_file_and_the_options(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    with pytest.raises(SystemExit) as error:
        cli.require_start_weights(Start('torchvision://resnet50', frozen_stages=1))
    message = str(error.value)
    assert message.startswith(
        'model.backbone.init_cfg.checkpoint: torchvision://resnet50 cannot be'
    )
    assert 'torchvision' in message.partition('read as a checkpoint: ')[2]
    assert re.search(r'fetch https://\S+/resnet50-\w+\.pth and set --cfg-options model', message)
    assert message.endswith(
        'model.backbone.init_cfg=None model.backbone.frozen_stages=-1 '
        'model.backbone.norm_eval=False'
    )
    assert '\n' not in message


@pytest.mark.parametrize(
    ('path', 'address'),
    [
        ('open-mmlab://mmdet/mobilenet_v2', 'https://.*/mobilenet_v2_batch256_imagenet-'),
        ('mmcls://resnet50', 'https://.*/resnet50_8xb32_in1k_'),
        ('https://example.org/a.pth', 'https://example.org/a.pth'),
    ],
)
def test_without_a_network_the_address_is_named(monkeypatch, path, address):
    def offline(*args, **kwargs):
        raise OSError('no network')

    monkeypatch.setattr('mmengine.runner.checkpoint.load_from_http', offline)
    for loader in ('https://', 'http://'):
        monkeypatch.setitem(CheckpointLoader._schemes, loader, offline)
    with pytest.raises(SystemExit, match=rf': no network; fetch {address}'):
        cli.require_start_weights(Start(path))


def test_start_weights_that_are_there_are_accepted(tmp_path):
    torch.save({}, tmp_path / 'a.pth')
    model = nn.ModuleDict(dict(module=Start(str(tmp_path / 'a.pth'))))
    cli.require_start_weights(model)
    (tmp_path / 'a.pth').unlink()
    with pytest.raises(SystemExit, match=r'^model\.backbone\.init_cfg\.checkpoint not found: '):
        cli.require_start_weights(model)


@pytest.mark.parametrize('content', [b'text', b'', b'\xff\xd8\xff\xe0 and no more'])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    path = tmp_path / 'a.jpg'
    path.write_bytes(content)
    for given in (path, *([tmp_path] if not content.startswith(b'\xff') else [])):
        with pytest.raises(SystemExit, match=rf'^cannot be read as an image: {path}$'):
            cli.find_images(str(given))


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


def dynamic(kernel_num=4, classes=3):
    return nn.ModuleDict(
        dict(
            backbone=nn.Sequential(ODConv2d(3, 8, 3, kernel_num=kernel_num), nn.BatchNorm2d(8)),
            head=nn.Conv2d(8, classes, 1),
        )
    )


def require_weights(model, path):
    cli.require_weights(model, cli.require_checkpoint(str(path)))


@pytest.mark.parametrize('wrapped', [True, False])
def test_weights_that_fit_are_loaded(tmp_path, wrapped):
    model, other = dynamic(), dynamic()
    state = {'module.' * wrapped + name: t for name, t in model.state_dict().items()}
    torch.save({'state_dict': state, 'meta': {}}, tmp_path / 'a.pth')
    require_weights(other, tmp_path / 'a.pth')
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in model.state_dict().items())


def test_static_weights_fit(tmp_path):
    plain = nn.ModuleDict(
        dict(backbone=nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), head=nn.Conv2d(8, 3, 1))
    )
    torch.save(plain.state_dict(), tmp_path / 'a.pth')
    require_weights(dynamic(), tmp_path / 'a.pth')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(kernel_num=2), '1 banks have K=2 in the file, K=4 in the config'),
        (
            dict(classes=5),
            r'head\.weight has shape \(5, 8, 1, 1\) in the file, \(3, 8, 1, 1\) in the config '
            r'\(and 1 more like it\)',
        ),
    ],
)
def test_weights_of_another_shape_end_the_program(tmp_path, options, message):
    torch.save(dynamic(**options).state_dict(), tmp_path / 'a.pth')
    with pytest.raises(SystemExit, match=rf'a\.pth does not fit the config: {message}'):
        require_weights(dynamic(), tmp_path / 'a.pth')


def test_weights_of_another_model_end_the_program(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / 'a.pth')
    with pytest.raises(SystemExit, match=r'of the \d+ weights of the model are not in the file'):
        require_weights(dynamic(), tmp_path / 'a.pth')


@pytest.mark.parametrize('content', [b'', b'text', pickle.dumps(3)])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    (tmp_path / 'a.pth').write_bytes(content)
    with pytest.raises(SystemExit, match=r'a\.pth (cannot be read as a checkpoint|has no state)'):
        require_weights(dynamic(), tmp_path / 'a.pth')


def test_a_truncated_checkpoint_is_named(tmp_path):
    torch.save(dynamic().state_dict(), tmp_path / 'a.pth')
    content = (tmp_path / 'a.pth').read_bytes()
    (tmp_path / 'a.pth').write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit, match=r'a\.pth cannot be read as a checkpoint'):
        require_weights(dynamic(), tmp_path / 'a.pth')
