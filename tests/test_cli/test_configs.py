import argparse

import pytest
import torch
import torch.distributed as dist
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel

from mmdet_odconv import cli
from tests.conftest import ROOT

CONFIG = str(ROOT / 'configs/odconv/retinanet_od_r18_shapes.py')


def test_a_typo_in_a_path_is_answered_with_near_names():
    with pytest.raises(SystemExit) as error:
        cli.load_config(CONFIG.replace('r18', 'r81'))
    message = str(error.value)
    assert message.startswith('config not found: ')
    assert f'is it {CONFIG}' in message


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
        ('backbone.depth', 'model.backbone.depth'),
        ('num_classes', 'model.bbox_head.num_classes'),
    ],
)
def test_an_override_that_is_nearly_a_key_is_refused(option, right):
    with pytest.raises(SystemExit, match=rf'^--cfg-options {option}: .* is it {right}\?$'):
        cli.load_config(CONFIG, {option: 1})


@pytest.mark.parametrize('given', ['', 'odconv=dict(min_channels=8),'])
def test_an_override_of_the_conversion_without_the_model_is_refused(tmp_path, given):
    path = tmp_path / 'config.py'
    path.write_text(f"model = dict(type='ODConvModel', {given} detector='FCOS')")
    with pytest.raises(SystemExit, match=r'has no odconv; is it model\.odconv\.kernel_num\?$'):
        cli.load_config(str(path), {'odconv.kernel_num': 2})
    with pytest.raises(SystemExit, match=r'has no anything$'):
        cli.load_config(str(path), {'anything.kernel_num': 2})


def test_new_keys_can_be_set():
    options = {'model.backbone.with_cp': True, 'randomness.seed': 1, 'own_variable': 2}
    config = cli.load_config(CONFIG, options)
    assert (config.model.backbone.with_cp, config.randomness.seed) == (True, 1)


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
def several_processes(tmp_path, monkeypatch):
    """A config for the only process of a distributed run, and no GPU."""
    register_all_modules()
    monkeypatch.setattr('mmdet_odconv.cli.configs.get_device', lambda: 'cpu')
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
