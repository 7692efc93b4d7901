import contextlib
import os
import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.runner import CheckpointLoader
from torch import nn

from mmdet_odconv import ODConv2d, compat
from mmdet_odconv.safe_running import (
    CheckpointFileError,
    latest_checkpoint,
    read_checkpoint,
    reading,
)
from mmdet_odconv.safe_running.checkpoint import _generators


class Hostile:
    """What runs a stranger's command where pickles are trusted."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


def test_a_checkpoint_is_read(tmp_path):
    torch.save(dict(state_dict=dict(a=torch.ones(2))), tmp_path / 'good.pth')
    assert read_checkpoint(str(tmp_path / 'good.pth')).content['state_dict']['a'].sum() == 2


@pytest.mark.parametrize('part', [0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_files_are_named(tmp_path, part):
    path = tmp_path / 'half.pth'
    torch.save(dict(state_dict=dict(a=torch.randn(1000))), path)
    os.truncate(path, int(path.stat().st_size * part))
    with pytest.raises(
        CheckpointFileError, match=f'^{path} cannot be read as a checkpoint: .'
    ) as e:
        read_checkpoint(str(path))
    assert '\n' not in str(e.value)


def as_zip(content, path):
    torch.save(content, path)


def as_before_torch_1_6(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_mere_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


@pytest.fixture(params=['of this version', 'before torch 2.6'])
def _safe_mode(request, monkeypatch):
    """Both ways of reading, and a ``torch.load`` that runs everything unless it is told not to."""
    if request.param == 'before torch 2.6':
        monkeypatch.setattr(compat, '_SAFE_MODE_TAKES_NAMES', False)
    load = torch.load

    def trusting(*args, weights_only=False, **kwargs):
        return load(*args, weights_only=weights_only, **kwargs)

    monkeypatch.setattr(torch, 'load', trusting)
    monkeypatch.setattr(compat, '_torch_load', trusting)


@pytest.mark.usefixtures('_safe_mode')
@pytest.mark.parametrize('write', [as_zip, as_before_torch_1_6, as_mere_pickle])
def test_a_strangers_code_does_not_run(tmp_path, write):
    path, proof = tmp_path / 'hostile.pth', tmp_path / 'proof'
    write(dict(state_dict=dict(a=Hostile(proof))), path)
    with pytest.raises(CheckpointFileError, match=f'^{path} cannot be read') as error:
        read_checkpoint(str(path))
    assert 'nothing of it was run' in str(error.value)
    assert 'arbitrary code' not in str(error.value)
    assert not proof.exists()
    with contextlib.suppress(Exception):  # the test's own proof that it can fail
        torch.load(path)
    assert proof.exists()


@pytest.mark.usefixtures('_safe_mode')
def test_a_strangers_code_does_not_run_from_the_web_either(tmp_path, monkeypatch):
    """torch.hub reads what it has fetched, here in an earlier run, without the safe mode."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    path, proof = tmp_path / 'hub/checkpoints/hostile.pth', tmp_path / 'proof'
    path.parent.mkdir(parents=True)
    torch.save(dict(state_dict=dict(a=Hostile(proof))), path)
    trusting = torch.load
    with pytest.raises(CheckpointFileError, match=r'hostile\.pth cannot .*nothing of it was run'):
        read_checkpoint('https://example.org/hostile.pth')
    assert not proof.exists()
    assert torch.load is trusting
    with contextlib.suppress(Exception):
        CheckpointLoader.load_checkpoint('https://example.org/hostile.pth')
    assert proof.exists()


@pytest.mark.usefixtures('_safe_mode')
@pytest.mark.parametrize('write', [as_zip, as_before_torch_1_6])
def test_what_mmengine_saves_is_read_whole(tmp_path, write):
    model = nn.Sequential(ODConv2d(4, 6, 3), nn.BatchNorm2d(6))
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    hub = MessageHub.get_instance('reading')
    hub.update_scalar('train/loss', 3.0)
    hub.update_info('numbers', [np.float32(1), np.int64(2), np.bool_(True), np.zeros(2, np.uint8)])
    content = dict(
        meta=dict(seed=3, dataset_meta=dict(classes=('a',), palette=[(1, 2, 3)])),
        state_dict=dict(model.state_dict(), half=torch.ones(2).half(), mask=torch.ones(2) > 0),
        optimizer=optimizer.state_dict(),
        message_hub=hub.state_dict(),
        position=dict(generators=[_generators()]),
    )
    write(content, tmp_path / 'a.pth')
    checkpoint = read_checkpoint(str(tmp_path / 'a.pth'))
    assert checkpoint.meta == content['meta']
    for name, value in content['state_dict'].items():
        assert torch.equal(checkpoint.content['state_dict'][name], value), name
    moment = checkpoint.content['optimizer']['state'][0]['exp_avg']
    assert torch.equal(moment, optimizer.state_dict()['state'][0]['exp_avg'])
    log = checkpoint.content['message_hub']['log_scalars']['train/loss']
    assert log.statistics('mean') == 3


def test_what_is_no_checkpoint_is_named(tmp_path):
    path = tmp_path / 'list.pth'
    torch.save([1, 2], path)
    with pytest.raises(CheckpointFileError, match='has no state dict, but a list'):
        read_checkpoint(str(path))
    with pytest.raises(CheckpointFileError, match=r'nowhere\.pth'):
        read_checkpoint(str(tmp_path / 'nowhere.pth'))


class TestLatestCheckpoint:
    @pytest.fixture
    def folder(self, tmp_path):
        for epoch in (1, 2):
            path = tmp_path / f'epoch_{epoch}.pth'
            torch.save(dict(optimizer={}, epoch=epoch), path)
            os.utime(path, (epoch, epoch))
        (tmp_path / 'last_checkpoint').write_text(str(path))
        return tmp_path

    def test_is_the_one_that_is_named(self, folder):
        (folder / 'last_checkpoint').write_text(str(folder / 'epoch_1.pth'))
        assert latest_checkpoint(str(folder)).path == str(folder / 'epoch_1.pth')

    @pytest.mark.parametrize('part', [0, 0.01, 0.9])
    def test_is_never_a_truncated_one(self, folder, part):
        path = folder / 'epoch_2.pth'
        os.truncate(path, int(path.stat().st_size * part))
        assert latest_checkpoint(str(folder)).path == str(folder / 'epoch_1.pth')

    @pytest.mark.parametrize('name', ['', 'elsewhere/epoch_2.pth', 'epoch_7.pth'])
    def test_is_found_where_its_name_is_lost(self, folder, name):
        (folder / 'last_checkpoint').write_text(name)
        assert latest_checkpoint(str(folder)).path == str(folder / 'epoch_2.pth')
        (folder / 'last_checkpoint').unlink()
        assert latest_checkpoint(str(folder)).path == str(folder / 'epoch_2.pth')

    def test_is_no_best_checkpoint_which_has_no_optimizer(self, folder):
        torch.save(dict(state_dict={}), folder / 'best_acc.pth')
        torch.save(dict(state_dict={}), folder / 'weights.pth')
        (folder / 'last_checkpoint').unlink()
        assert latest_checkpoint(str(folder)).path == str(folder / 'epoch_2.pth')

    def test_is_no_link_that_leads_nowhere(self, folder):
        (folder / 'latest.pth').symlink_to(folder / 'epoch_9.pth')
        assert latest_checkpoint(str(folder)).path == str(folder / 'epoch_2.pth')

    def test_is_none_in_a_new_folder(self, tmp_path):
        assert latest_checkpoint(str(tmp_path)) is None

    def test_without_a_readable_one_names_file_and_cause(self, folder):
        for path in folder.glob('*.pth'):
            path.write_bytes(b'no checkpoint')
        with pytest.raises(CheckpointFileError, match=r'epoch_2\.pth cannot be read'):
            latest_checkpoint(str(folder))


def dynamic(kernel_num=4, classes=3):
    return nn.ModuleDict(
        dict(
            backbone=nn.Sequential(ODConv2d(3, 8, 3, kernel_num=kernel_num), nn.BatchNorm2d(8)),
            head=nn.Conv2d(8, classes, 1),
        )
    )


def test_weights_of_another_norm_are_named(tmp_path):
    """A LayerNorm has all its entries in the file of a BatchNorm."""
    path = tmp_path / 'a.pth'
    for kind in ('LN', 'BN'):
        layer = nn.Sequential(ODConv2d(16, 8, 3, norm_cfg=dict(type=kind)))
        torch.save(layer.state_dict(), path)
        require_weights(layer, path)
    layer = nn.Sequential(ODConv2d(16, 8, 3, norm_cfg=dict(type='LN')))
    with pytest.raises(
        SystemExit, match=r'0\.attention\.bn is a BatchNorm in the file, but not in'
    ):
        require_weights(layer, path)


def require_weights(model, path):
    reading.require_weights(model, read_checkpoint(str(path)))


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
        (dict(kernel_num=2), r'size mismatch for backbone\.0\.'),
        (dict(classes=5), r'size mismatch for head\.weight: .*\(and 1 more like it\)$'),
    ],
)
def test_weights_of_another_shape_end_the_program(tmp_path, options, message):
    torch.save(dynamic(**options).state_dict(), tmp_path / 'a.pth')
    with pytest.raises(SystemExit, match=rf'a\.pth does not fit the config: {message}'):
        require_weights(dynamic(), tmp_path / 'a.pth')


def test_weights_of_another_model_end_the_program(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / 'a.pth')
    with pytest.raises(SystemExit, match=r'backbone\.0\.weight is not in the file \(and \d+'):
        require_weights(dynamic(), tmp_path / 'a.pth')
