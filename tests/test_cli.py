import argparse
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.model import BaseModule, MMDistributedDataParallel
from torch import nn

from mmdet_odconv import cli
from tests.conftest import ROOT

CONFIG = str(ROOT / 'configs/odconv/retinanet_od_r18_shapes.py')


def test_a_config_that_is_not_there_is_named():
    with pytest.raises(SystemExit, match=r'^config not found: /'):
        cli.load_config(CONFIG.replace('r18', 'r81'))


def test_overrides_are_merged_and_bad_ones_refused():
    config = cli.load_config(CONFIG, {'model.backbone.kernel_num': 2})
    assert config.model.backbone.kernel_num == 2
    with pytest.raises(SystemExit, match=r'--cfg-options .*does not fit'):
        cli.load_config(CONFIG, {'train_dataloader.dataset.pipeline.77.scale': 3})


def test_an_override_of_a_part_that_is_not_there_is_refused():
    """``model.`` forgotten, most often: MMEngine would add a key that nothing reads."""
    with pytest.raises(SystemExit, match=r'^--cfg-options odconv\.kernel_num: .* has no odconv$'):
        cli.load_config(CONFIG, {'odconv.kernel_num': 2})


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
    monkeypatch.setattr('mmdet_odconv.cli.get_device', lambda: 'cpu')
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


def test_processes_train_on_cpus(several_processes):
    several_processes.env_cfg.dist_cfg = dict(backend='gloo', timeout=60)
    choose = torch.cuda.set_device
    runner = cli.build_runner(several_processes)
    assert isinstance(runner.model, MMDistributedDataParallel)
    assert runner.model.device_ids is None
    assert dist.get_backend() == 'gloo'
    assert torch.cuda.set_device is choose


def test_an_override_without_a_value_is_refused(capsys):
    parser = argparse.ArgumentParser()
    cli.add_config_options(parser)
    with pytest.raises(SystemExit) as error:
        parser.parse_args(['--cfg-options', 'train_cfg.max_epochs'])
    assert error.value.code == 2
    assert "takes key=value, got 'train_cfg.max_epochs'" in capsys.readouterr().err


@pytest.mark.parametrize('text', ['0', '-3', 'two', '1.5'])
def test_a_count_is_a_whole_number_of_at_least_one(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f'at least 1, got {text}'):
        cli.positive(text)


def test_paths_with_a_scheme_are_left_to_mmengine():
    cli.require_file('https://example.org/weights.pth', 'checkpoint')


def test_a_relative_path_is_said_once_with_the_folder_it_was_looked_for_in(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path, times in (('weights.pth', 1), (str(tmp_path / 'weights.pth'), 1)):
        with pytest.raises(SystemExit) as error:
            cli.require_file(path, 'checkpoint')
        assert str(error.value).count(str(tmp_path)) == times


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r' is a folder, where the checkpoint should be a file$'):
        cli.require_file(str(tmp_path), 'checkpoint')


def test_a_result_is_not_computed_that_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match='is a folder, where a file is to be written'):
        cli.require_new_file(str(tmp_path), force=True)
    monkeypatch.setattr('tempfile.TemporaryFile', mock.Mock(side_effect=PermissionError(13, 'No')))
    with pytest.raises(SystemExit, match=r'a\.json cannot be written \(No\)$'):
        cli.require_new_file(str(tmp_path / 'a.json'), force=False)


@pytest.mark.parametrize('content', [b'text', b''])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    path = tmp_path / 'a.jpg'
    path.write_bytes(content)
    for given in (path, tmp_path):
        with pytest.raises(SystemExit, match=rf'^cannot be read as an image: {path}$'):
            cli.find_images(str(given))


def test_a_detector_is_not_loaded_where_it_cannot_run(tmp_path):
    config = cli.load_config(CONFIG)
    with pytest.raises(SystemExit, match=r'^--device gpu cannot be used: '):
        cli.load_detector(config, str(tmp_path / 'a.pth'), 'gpu')
    with pytest.raises(SystemExit, match=r'^checkpoint not found: '):
        cli.load_detector(config, str(tmp_path / 'a.pth'))


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
    key = 'model.backbone.init_cfg'
    assert message.startswith(f'{key}.checkpoint: torchvision://resnet50 cannot be read')
    assert f'--cfg-options {key}=None' in message
    assert '\n' not in message


def test_weights_of_the_web_without_a_network_end_in_one_sentence(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise OSError('no network')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with pytest.raises(SystemExit, match=r'a\.pth cannot be read .*: no network; name another'):
        cli.require_start_weights(Start('https://example.org/a.pth'))


def test_start_weights_that_are_there_are_accepted(tmp_path):
    torch.save({}, tmp_path / 'a.pth')
    model = nn.ModuleDict(dict(module=Start(str(tmp_path / 'a.pth'))))
    cli.require_start_weights(model)
    (tmp_path / 'a.pth').unlink()
    with pytest.raises(
        SystemExit, match=r'^model\.backbone\.init_cfg\.checkpoint: .*No such file .*a\.pth'
    ):
        cli.require_start_weights(model)
