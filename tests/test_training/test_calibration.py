"""ODConvCalibrationHook in trainings of MMEngine's runner."""

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.checkpoint import checkpoint

from mmdet_odconv import ODConv2d


class Model(BaseModel):
    def __init__(self, with_cp=None):
        super().__init__()
        self.layer = ODConv2d(3, 4, 3, norm_cfg=dict(type='CalibratedNorm'))
        self.with_cp = with_cp

    def forward(self, x, mode='tensor'):
        if self.with_cp is None:
            y = self.layer(x)
        else:
            y = checkpoint(self.layer, x.requires_grad_(), use_reentrant=self.with_cp)
        return dict(loss=y.square().mean())


def images():
    return torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def train(tmp_path, model, accumulative_counts=1, epochs=1, resume=False):
    runner = Runner(
        model,
        str(tmp_path),
        train_dataloader=torch.utils.data.DataLoader([dict(x=x) for x in images()], batch_size=2),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(
            optimizer=dict(type='SGD', lr=0.0), accumulative_counts=accumulative_counts
        ),
        custom_hooks=[dict(type='ODConvCalibrationHook')],
        default_scope='mmengine',
        experiment_name=f'{tmp_path.name}{epochs}{resume}',
        resume=resume,
        randomness=dict(seed=0),
    )
    runner.train()
    return model.layer.attention


@pytest.mark.parametrize('accumulative_counts', [1, 4])
@pytest.mark.parametrize('with_cp', [None, True, False])
def test_each_batch_counts_once(tmp_path, with_cp, accumulative_counts):
    attention = train(tmp_path, Model(with_cp), accumulative_counts)
    h = attention.fc(images().mean((2, 3)))
    assert attention.bn.num_batches_tracked == 6
    torch.testing.assert_close(attention.bn.running_mean, h.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        attention.bn.running_var, h.var(0, correction=0), rtol=1e-3, atol=1e-6
    )


def test_a_resumed_training_goes_on_with_the_statistics(tmp_path):
    torch.manual_seed(0)
    model = Model()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    whole = train(tmp_path / 'whole', model, epochs=2).bn
    stopped = Model()
    stopped.load_state_dict(start)
    train(tmp_path / 'parts', stopped, epochs=1)
    resumed = train(tmp_path / 'parts', Model(), epochs=2, resume=True).bn
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict())


def test_warns_where_there_is_nothing_to_calibrate(tmp_path):
    model = Model()
    model.layer = ODConv2d(3, 4, 3, norm_cfg=dict(type='LN'))
    train(tmp_path, model)
    assert 'has no CalibratedNorm' in next(tmp_path.glob('*/*.log')).read_text()
