"""Paths and data that several tests use."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from mmengine.logging import MessageHub

import mmdet_odconv  # noqa: F401  registers everything
from mmdet_odconv.compat import ONNX_EXPORT

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / 'shared' / 'data'

settings.register_profile('suite', max_examples=200, deadline=None, derandomize=True)
settings.register_profile('fuzz', max_examples=3000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'suite'))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that take many minutes, unless ``-m`` asks for their mark."""
    for mark in ('slow', 'faults', 'load'):
        if mark not in config.option.markexpr:
            left_out = [item for item in items if item.get_closest_marker(mark)]
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def tell_the_first_iteration() -> None:
    """What a runner tells the parts of a detector that ask how far the training is."""
    hub = MessageHub.get_current_instance()  # of the latest runner, if another test had one
    hub.update_info('epoch', 0)
    hub.update_info('iter', 0)


@pytest.fixture
def _first_iteration() -> None:
    tell_the_first_iteration()


@pytest.fixture(scope='session')
def _onnx_export() -> None:
    for package in ('onnx', 'onnxruntime', 'onnxscript'):
        pytest.importorskip(package)
    if not ONNX_EXPORT:
        pytest.skip('ONNX files are written from torch 2.6 on')


@pytest.fixture
def coco128() -> Path:
    return _optional('COCO128_ROOT', SHARED / 'coco128')


@pytest.fixture
def bccd() -> Path:
    return _optional('BCCD_ROOT', SHARED / 'bccd')


@pytest.fixture
def deeppcb() -> Path:
    return _optional('DEEPPCB_ROOT', SHARED / 'deeppcb')


@pytest.fixture
def hituav() -> Path:
    return _optional('HITUAV_ROOT', SHARED / 'hituav')


def _optional(variable: str, default: Path) -> Path:
    path = Path(os.environ.get(variable, default))
    if not path.is_dir():
        pytest.skip(f'optional data set absent: {path} (set {variable})')
    return path


def load_cases(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding='utf-8'))
