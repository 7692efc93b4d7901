import os
import pickle

import pytest
import torch

from mmdet_odconv.checkpoint import CheckpointFileError, latest_checkpoint, read_checkpoint


class Hostile:
    """What runs a stranger's command where pickles are trusted."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


def test_a_checkpoint_is_read(tmp_path):
    torch.save(dict(state_dict=dict(a=torch.ones(2))), tmp_path / 'good.pth')
    assert read_checkpoint(str(tmp_path / 'good.pth'))['state_dict']['a'].sum() == 2


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


@pytest.mark.skipif(
    not hasattr(torch.serialization, 'get_unsafe_globals_in_checkpoint'),
    reason='torch.load is in its safe mode from torch 2.6 on',
)
@pytest.mark.parametrize('write', [torch.save, lambda o, path: path.write_bytes(pickle.dumps(o))])
def test_a_strangers_code_does_not_run(tmp_path, write):
    path, proof = tmp_path / 'hostile.pth', tmp_path / 'proof'
    write(dict(state_dict=dict(a=Hostile(proof))), path)
    with pytest.raises(CheckpointFileError, match=f'^{path} cannot be read') as error:
        read_checkpoint(str(path))
    assert 'nothing of it was run' in str(error.value)
    assert 'arbitrary code' not in str(error.value)
    assert not proof.exists()


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
        assert latest_checkpoint(str(folder)) == str(folder / 'epoch_1.pth')

    @pytest.mark.parametrize('size', [0, 10, 900])
    def test_is_never_a_truncated_one(self, folder, size):
        os.truncate(folder / 'epoch_2.pth', size)
        assert latest_checkpoint(str(folder)) == str(folder / 'epoch_1.pth')

    @pytest.mark.parametrize('name', ['', 'elsewhere/epoch_2.pth', 'epoch_7.pth'])
    def test_is_found_where_its_name_is_lost(self, folder, name):
        (folder / 'last_checkpoint').write_text(name)
        assert latest_checkpoint(str(folder)) == str(folder / 'epoch_2.pth')
        (folder / 'last_checkpoint').unlink()
        assert latest_checkpoint(str(folder)) == str(folder / 'epoch_2.pth')

    def test_is_no_best_checkpoint_which_has_no_optimizer(self, folder):
        torch.save(dict(state_dict={}), folder / 'best_acc.pth')
        torch.save(dict(state_dict={}), folder / 'weights.pth')
        (folder / 'last_checkpoint').unlink()
        assert latest_checkpoint(str(folder)) == str(folder / 'epoch_2.pth')

    def test_is_none_in_a_new_folder(self, tmp_path):
        assert latest_checkpoint(str(tmp_path)) is None

    def test_without_a_readable_one_names_file_and_cause(self, folder):
        for path in folder.glob('*.pth'):
            path.write_bytes(b'no checkpoint')
        with pytest.raises(CheckpointFileError, match=r'epoch_2\.pth cannot be read'):
            latest_checkpoint(str(folder))
