from unittest import mock

import pytest

from mmdet_odconv import cli


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


def test_a_result_is_not_computed_that_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match='is a folder, where a file is to be written'):
        cli.require_new_file(str(tmp_path), force=True)
    monkeypatch.setattr('tempfile.TemporaryFile', mock.Mock(side_effect=PermissionError(13, 'No')))
    with pytest.raises(SystemExit, match=r'a\.json cannot be written \(No\)$'):
        cli.require_new_file(str(tmp_path / 'a.json'), force=False)


@pytest.mark.parametrize('content', [b'text', b'', b'\xff\xd8\xff\xe0 and no more'])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    path = tmp_path / 'a.jpg'
    path.write_bytes(content)
    for given in (path, *([tmp_path] if not content.startswith(b'\xff') else [])):
        with pytest.raises(SystemExit, match=rf'^cannot be read as an image: {path}$'):
            cli.find_images(str(given))
