"""Long runs: what they hold on to, and many threads on one model."""

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import nn

from mmdet_odconv import ODConv2d, ODResNet
from mmdet_odconv.functional import dispatch
from tests.conftest import ROOT
from tests.predictions import predict

pytestmark = [pytest.mark.load, pytest.mark.timeout(3600)]
needs_proc = pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='no /proc')


def resident_bytes():
    gc.collect()
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def open_files():
    return len(os.listdir('/proc/self/fd'))


@pytest.fixture(scope='module')
def detector():
    register_all_modules()
    torch.manual_seed(0)
    config = Config.fromfile(ROOT / 'configs/odconv/retinanet_od_r18_shapes.py').model
    config.backbone.base_channels = 8
    config.neck.in_channels = [8, 16, 32, 64]
    config.test_cfg.score_thr = 0.0
    model = MODELS.build(config)
    model.init_weights()
    return model.eval()


@needs_proc
def test_2000_iterations_hold_on_to_nothing():
    """After a warm-up of 200 iterations: memory, open files."""
    torch.manual_seed(0)
    stages = dict(num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1))
    model = ODResNet(depth=18, base_channels=4, **stages)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    memory = {}
    for iteration in range(2201):
        if iteration in (200, 1200, 2200):
            memory[iteration] = (resident_bytes(), open_files())
        x = torch.randn(2, 3, 32, 32 + 8 * (iteration % 5))
        optimizer.zero_grad()
        sum(y.square().mean() for y in model(x)).backward()
        optimizer.step()
    (start, files), (end, files_at_end) = memory[200], memory[2200]
    print(f'{start / 2**20:.1f} MiB after 200 iterations, {end / 2**20:.1f} after 2,200; {memory}')
    assert end < 1.02 * start
    assert files_at_end <= files


def test_1000_images_of_mixed_sizes_are_remembered_within_bounds():
    torch.manual_seed(0)
    model = nn.Sequential(
        ODConv2d(3, 8, 3, stride=2, padding=1), ODConv2d(8, 8, 3, padding=1)
    ).eval()
    dispatch.pick.cache_clear()
    memory = {}
    with torch.no_grad():
        for image in range(1000):
            height, width = torch.randint(8, 200, (2,)).tolist()
            model(torch.randn(1, 3, height, width))
            if image in (100, 999):
                memory[image] = resident_bytes()
    remembered = dispatch.pick.cache_info()
    print(f'{remembered}, {memory}')
    assert remembered.currsize <= remembered.maxsize


def test_8_threads_on_one_model_get_the_boxes_of_one(detector):
    images = [
        demo_mm_inputs(2, [[3, 64 + 8 * (i % 4), 96]] * 2, num_classes=5, use_box_type=True)
        for i in range(24)
    ]
    expected = [predict(detector, batch) for batch in images]
    with ThreadPoolExecutor(8) as threads:
        actual = list(threads.map(lambda batch: predict(detector, batch), images))
    found = 0
    pairs = zip(chain.from_iterable(actual), chain.from_iterable(expected), strict=True)
    for one, other in pairs:
        found += len(other.pred_instances)
        for key in ('bboxes', 'scores', 'labels'):
            assert torch.equal(one.pred_instances[key], other.pred_instances[key])
    assert found > 0
