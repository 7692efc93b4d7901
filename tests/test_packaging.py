"""The package as it is installed: from a wheel, from an sdist, editable, under any locale."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

import mmdet_odconv
from tests.conftest import ROOT
from tests.test_tools.test_train_and_test import SMALL

MIM = 'mmdet_odconv/.mim'
# An ASCII locale in which Python does not help itself, and says where a file has no encoding.
ASCII = dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0', PYTHONWARNDEFAULTENCODING='1')


def run(*command, folder, **env):
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, **env},
        capture_output=True,
        encoding='utf-8',
        errors='replace',
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def files(folder):
    paths = (path for path in folder.rglob('*') if path.is_file())
    names = {path.relative_to(folder).as_posix() for path in paths}
    return {name for name in names if '__pycache__' not in name}


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp('sdist')
    run('setup.py', '-q', 'egg_info', '-e', folder, 'sdist', '-d', folder, folder=ROOT)
    shutil.unpack_archive(next(folder.glob('*.tar.gz')), folder)
    return folder / f'mmdet_odconv-{mmdet_odconv.__version__}'


@pytest.fixture(scope='module')
def lib(source, tmp_path_factory):
    """A folder with what a wheel made of the sdist installs."""
    folder = tmp_path_factory.mktemp('wheel')
    run('setup.py', '-q', 'bdist_wheel', '-d', folder, folder=source)
    with zipfile.ZipFile(next(folder.glob('*.whl'))) as wheel:
        wheel.extractall(folder / 'lib')
    return folder / 'lib'


def test_a_wheel_made_of_the_sdist_has_all_files(lib):
    expected = {f'{MIM}/model-index.yml'}
    for part in ('configs', 'tools'):
        expected |= {f'{MIM}/{part}/{name}' for name in files(ROOT / part)}
    package = files(ROOT / 'mmdet_odconv')
    expected |= {f'mmdet_odconv/{name}' for name in package if not name.startswith('.mim')}
    assert {name for name in files(lib) if '.dist-info/' not in name} == expected


def test_configs_of_an_installed_package_are_bases_of_others(lib, tmp_path):
    """``mmdet_odconv::odconv/...``, from the folder in which the package keeps its configs."""
    (tmp_path / 'mine.py').write_text(
        "_base_ = 'mmdet_odconv::odconv/retinanet_od_r50.py'\n"
        'model = dict(backbone=dict(kernel_num=2))\n'
    )
    (tmp_path / 'small.py').write_text(
        "_base_ = ['mmdet_odconv::_base_/schedules/schedule_small.py',\n"
        "          'mmdet_odconv::_base_/models/retinanet_small.py']\n"
        'model = dict(backbone=dict(depth=18))\n'
    )
    code = (
        'import mmdet_odconv\n'
        'from mmengine.config import Config\n'
        'from mmengine.hub import get_config\n'
        'print(mmdet_odconv.__file__)\n'
        'for name in ("mine.py", "small.py"):\n'
        '    backbone = Config.fromfile(name).model.backbone\n'
        '    print(backbone.type, backbone.get("kernel_num"), backbone.depth)\n'
        'print(get_config("mmdet_odconv::odconv/retinanet_od_r50.py").model.backbone.type)\n'
    )
    result = run('-c', code, folder=tmp_path, PYTHONPATH=str(lib))
    assert result.stdout.splitlines()[-4:] == [
        str(lib / 'mmdet_odconv/__init__.py'),
        'ODResNet 2 50',
        'ResNet None 18',
        'ODResNet',
    ]


@pytest.mark.parametrize('possible', [True, False])
def test_an_editable_install_links_where_it_can_and_copies_elsewhere(source, tmp_path, possible):
    folder = tmp_path / 'source'
    shutil.copytree(source, folder)
    code = 'import os, runpy, sys\n'
    if not possible:
        code += (
            'def fail(*args, **kwargs):\n'
            '    raise OSError(1314, "A required privilege is not held by the client")\n'
            'os.symlink = fail\n'
        )
    code += (
        f'sys.argv = ["setup.py", "editable_wheel", "-d", {str(tmp_path)!r}]\n'
        'runpy.run_path("setup.py", run_name="__main__")\n'
    )
    result = run('-c', code, folder=folder)
    assert list(tmp_path.glob('*.whl'))
    for part in ('configs', 'tools', 'model-index.yml'):
        assert (folder / MIM / part).is_symlink() == possible
    assert files(folder / MIM / 'configs') == files(folder / 'configs')
    assert ('install again after you change' in result.stderr) != possible


@pytest.mark.slow
def test_the_tools_of_a_wheel_run_anywhere_with_names_in_any_script(lib, tmp_path):
    """Class names, folders and annotations in Chinese, where the locale knows ASCII only."""
    tools = lib / MIM / 'tools'
    env = dict(ASCII, PYTHONPATH=str(lib))
    made = ['data/shapes', '--train', 4, '--val', 2, '--size', 96, 96]
    results = [run(tools / 'study/make_shapes_dataset.py', *made, folder=tmp_path, **env)]
    for path in tmp_path.glob('data/shapes/annotations/*.json'):
        content = json.loads(path.read_text(encoding='utf-8'))
        content['categories'][0]['name'] = '圆'
        path.write_text(json.dumps(content, ensure_ascii=False), encoding='utf-8')
    names = ('圆', *(category['name'] for category in content['categories'][1:]))
    config = tmp_path / '检测.py'
    config.write_text(
        "_base_ = 'mmdet_odconv::odconv/retinanet_od_r18_shapes.py'\n"
        f'train_dataloader = dict(dataset=dict(metainfo=dict(classes={names})))\n'
        f'val_dataloader = dict(dataset=dict(metainfo=dict(classes={names})))\n'
        'test_dataloader = val_dataloader\n',
        encoding='utf-8',
    )
    options = ['--work-dir', '结果', '--cfg-options', *SMALL, 'train_cfg.max_epochs=1']
    results.append(run(tools / 'train.py', config.name, *options, folder=tmp_path, **env))
    checkpoint = (tmp_path / '结果/last_checkpoint').read_text(encoding='utf-8')
    drawn = ['data/shapes/val', '结果/检测.py', checkpoint, '--out-dir', '图']
    results.append(run(tools / 'image_demo.py', *drawn, folder=tmp_path, **env))
    assert len(list((tmp_path / '图').glob('*.png'))) == 2
    for result in results:
        warnings = [line for line in result.stderr.splitlines() if 'EncodingWarning' in line]
        assert not [line for line in warnings if line.startswith(str(lib))]
