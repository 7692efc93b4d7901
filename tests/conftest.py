"""Paths and data that several tests use."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub

import mmdet_odconv  # noqa: F401  registers everything

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / 'shared' / 'data'


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def _first_iteration() -> None:
    """What a runner tells the parts of a detector that ask how far the training is."""
    hub = MessageHub.get_instance('tests')
    hub.update_info('epoch', 0)
    hub.update_info('iter', 0)


@pytest.fixture
def coco128() -> Path:
    return _optional('COCO128_ROOT', SHARED / 'coco128')


@pytest.fixture
def bccd() -> Path:
    return _optional('BCCD_ROOT', SHARED / 'bccd')


@pytest.fixture
def deeppcb() -> Path:
    return _optional('DEEPPCB_ROOT', SHARED / 'deeppcb')


def _optional(variable: str, default: Path) -> Path:
    path = Path(os.environ.get(variable, default))
    if not path.is_dir():
        pytest.skip(f'optional data set absent: {path} (set {variable})')
    return path


def load_cases(path: Path) -> list[dict]:
    return json.loads(path.read_text())
