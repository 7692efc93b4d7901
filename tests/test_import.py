import importlib.metadata
import subprocess
import sys
from types import ModuleType

import pytest
from mmengine.registry import HOOKS, MODELS

import mmdet_odconv
from mmdet_odconv import compat


def test_public_names():
    for name in mmdet_odconv.__all__:
        assert hasattr(mmdet_odconv, name)


def test_importing_registers_everything_in_the_root_registries():
    names = ('ODConv', 'ODConv1d', 'ODConv2d', 'ODConv3d')
    names += ('ODResNet', 'ODResNetV1d', 'ODResNeXt', 'ODMobileNetV2')
    assert all(name in MODELS.module_dict for name in names)
    assert 'ODConvTemperatureHook' in HOOKS.module_dict


@pytest.mark.parametrize('name', ['mmengine', 'mmcv', 'mmdet'])
@pytest.mark.parametrize('version', ['0.1.0', '9.0.0'])
def test_an_unsupported_version_is_named(monkeypatch, name, version):
    module = ModuleType(name)
    module.__version__ = version
    monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ImportError, match=rf'^{name} {version} is installed; .* supports {name}>='):
        compat.check_versions()


@pytest.mark.parametrize('version', ['2.0.0rc4', '2.1.0+cpu', '2.3.6'])
def test_a_supported_version_is_taken_whatever_its_suffix(monkeypatch, version):
    module = ModuleType('mmcv')
    module.__version__ = version
    monkeypatch.setitem(sys.modules, 'mmcv', module)
    compat.check_versions()


@pytest.mark.parametrize('name', ['mmengine', 'mmcv', 'mmdet'])
def test_a_missing_package_is_named(name):
    code = (
        'import sys\n'
        f'sys.modules[{name!r}] = None\n'
        'try:\n'
        '    import mmdet_odconv\n'
        'except ImportError as error:\n'
        '    print(error)\n'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.stdout.startswith(f'{name} is not installed; mmdet_odconv supports {name}>=')
    assert result.stdout.count('\n') == 1


def test_mmcv_without_its_operators_is_named(monkeypatch):
    monkeypatch.setattr(compat, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r'mmcv .* without its compiled operators'):
        compat.check_versions()


def test_versions_agree():
    assert importlib.metadata.version('mmdet_odconv') == mmdet_odconv.__version__


def test_importing_and_reading_rebinds_nothing_of_other_packages():
    """What the tools need of them, they do around their own calls."""
    code = (
        'import torch\n'
        'from mmengine.runner import checkpoint\n'
        'from pycocotools import coco\n'
        'def state():\n'
        '    return [dict(vars(m)) for m in (torch.hub, checkpoint, coco)] + [dict(a=torch.load)]\n'
        'before = state()\n'
        'import mmdet_odconv.cli\n'
        'from mmengine.config import Config\n'
        'with mmdet_odconv.cli.config_errors_as_exit(Config()):\n'
        '    assert coco.open.keywords == dict(encoding="utf-8")\n'
        'for old, new in zip(before, state()):\n'
        '    changed = [name for name in old if old[name] is not new.get(name)]\n'
        '    assert not changed and "open" not in new, changed\n'
    )
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)
