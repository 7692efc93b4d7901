"""The config lines of docs/small_objects.md."""

import re
import textwrap

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from tests.conftest import ROOT


@pytest.mark.parametrize('base', ['retinanet_od_r18', 'retinanet_od_r50'])
def test_a_level_of_stride_4_with_small_anchors(tmp_path, base):
    page = (ROOT / 'docs/small_objects.md').read_text()
    blocks = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
    assert len(blocks) == 2
    path = tmp_path / 'mine.py'
    own = [f'_base_ = {str(ROOT / "configs/odconv" / base) + ".py"!r}']
    path.write_text('\n'.join([*own, 'model = dict()', *map(textwrap.dedent, blocks)]))
    register_all_modules()
    config = Config.fromfile(path)
    config.model.backbone.init_cfg = None
    model = MODELS.build(config.model).eval()
    with torch.no_grad():
        scores, _ = model(torch.zeros(1, 3, 128, 128), mode='tensor')
    assert [128 // level.shape[-1] for level in scores] == [4, 8, 16, 32, 64]
    anchors = model.bbox_head.prior_generator.base_anchors[0]
    assert (anchors[:, 2:] - anchors[:, :2]).prod(1).sqrt().min() == pytest.approx(8)
