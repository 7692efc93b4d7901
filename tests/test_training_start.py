"""The defaults must train: at its start an ODConv detector is as calm as its plain twin."""

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config

from tests.conftest import ROOT


def gradient_norm(backbone, batch):
    register_all_modules()
    torch.manual_seed(0)
    config = Config.fromfile(ROOT / 'configs/odconv/retinanet_od_r18_shapes.py').model
    config.backbone.update(backbone)
    model = MODELS.build(config)
    model.init_weights()
    model.train()
    data = model.data_preprocessor(batch, training=True)
    losses, _ = model.parse_losses(model(**data, mode='loss'))
    losses.backward()
    return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()


@pytest.fixture
def similar_images():
    """Photographs of one kind differ little from each other in what a global average sees."""
    batch = demo_mm_inputs(8, [[3, 96, 96]] * 8, num_classes=5)
    base = batch['inputs'][0].float()
    batch['inputs'] = [
        (base + 10 * torch.randn_like(base)).clamp(0, 255).byte() for _ in batch['inputs']
    ]
    return batch


# With the last norm of each block at zero the first step does not reach the blocks at all.
@pytest.mark.parametrize('zero_init_residual', [True, False])
def test_gradients_of_the_default_start_are_the_plain_twins(similar_images, zero_init_residual):
    options = dict(zero_init_residual=zero_init_residual)
    plain = gradient_norm(dict(type='ResNet', **options), similar_images)
    dynamic = gradient_norm(dict(type='ODResNet', **options), similar_images)
    assert plain / 3 < dynamic < plain * 3


def test_the_published_start_has_gradients_beyond_that(similar_images):
    """What the default is for: should this fail, the default could be the paper's again."""
    options = dict(zero_init_residual=False)
    plain = gradient_norm(dict(type='ResNet', **options), similar_images)
    options['odconv_cfg'] = dict(attention_init='published')
    assert gradient_norm(dict(type='ODResNet', **options), similar_images) > plain * 3
