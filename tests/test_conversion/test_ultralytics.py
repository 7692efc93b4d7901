"""The recipe of docs/detectors.md for Ultralytics' YOLO: a whole training, cut and resumed."""

import copy
import re

import pytest
import torch
from PIL import Image

from mmdet_odconv import ODConv2d
from tests.conftest import ROOT

pytest.importorskip('ultralytics')
pytestmark = pytest.mark.slow


class CutError(Exception):
    """Ends a training, as a kill does."""


@pytest.fixture
def recipe():
    """What the page defines before it trains."""
    page = (ROOT / 'docs/detectors.md').read_text(encoding='utf-8')
    code = re.search(r'```python\n(from ultralytics import YOLO\n.*?)\nyolo = ', page, re.DOTALL)
    names = {}
    exec(code[1], names)
    return names


@pytest.fixture
def data(tmp_path):
    for split in ('train', 'val'):
        for folder in ('images', 'labels'):
            (tmp_path / folder / split).mkdir(parents=True)
        for i in range(4):
            Image.effect_noise((64, 64), 50).convert('RGB').save(
                tmp_path / f'images/{split}/{i}.jpg'
            )
            (tmp_path / f'labels/{split}/{i}.txt').write_text(f'{i % 2} 0.5 0.5 0.4 0.4\n')
    path = tmp_path / 'data.yaml'
    path.write_text(
        f'path: {tmp_path}\ntrain: images/train\nval: images/val\nnames: {{0: a, 1: b}}\n'
    )
    return dict(
        data=str(path),
        imgsz=64,
        batch=2,
        workers=0,
        device='cpu',
        amp=False,
        plots=False,
        project=str(tmp_path),
        name='run',
        exist_ok=True,
    )


def largest_difference(model, other):
    """Of all entries, relative to the largest value of each; the files are in half precision."""
    ours, theirs = model.float().state_dict(), other.float().state_dict()
    assert ours.keys() == theirs.keys()
    return max(
        ((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max().clamp(min=1e-3)).item()
        for n in ours
        if ours[n].numel()
    )


def test_a_training_is_resumed_with_all_its_weights(recipe, data, tmp_path):
    yolo = recipe['YOLO']('yolo11n.yaml')
    saved = []

    def cut(trainer):
        if trainer.epoch == 1:
            saved.append(copy.deepcopy(trainer.ema.ema))
            raise CutError

    yolo.add_callback('on_train_epoch_start', cut)
    with pytest.raises(CutError):
        yolo.train(trainer=recipe['ODConvTrainer'], epochs=3, **data)
    last = tmp_path / 'run/weights/last.pt'

    found = []
    yolo = recipe['YOLO'](last)
    yolo.add_callback(
        'on_train_start', lambda t: found.append(largest_difference(t.model, saved[0]))
    )
    yolo.train(trainer=recipe['ODConvTrainer'], resume=True)
    assert found[0] < 2e-3
    assert yolo.trainer.epoch == 2
    layers = [m for m in yolo.trainer.model.modules() if isinstance(m, ODConv2d)]
    assert len(layers) > 10
    assert any(layer.attention.channel_fc.weight.abs().sum() > 0 for layer in layers)


@pytest.mark.parametrize('dynamic', [False, True])
def test_a_training_starts_from_static_weights_and_from_banks(recipe, data, tmp_path, dynamic):
    from ultralytics.nn.tasks import DetectionModel

    trainer = recipe['ODConvTrainer'](overrides=dict(data, model='yolo11n.yaml', epochs=1))
    plain = DetectionModel('yolo11n.yaml', nc=2, verbose=False)
    weights = trainer.get_model('yolo11n.yaml', plain, verbose=False) if dynamic else plain
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    model = trainer.get_model('yolo11n.yaml', weights, verbose=False).eval()
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model(images)[0], weights.eval()(images)[0], rtol=1e-3, atol=1e-3)
