import copy
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from torch import nn

from mmdet_odconv.safe_running import NonFiniteError, NonFiniteHook
from mmdet_odconv.safe_running.non_finite import _images
from tests.tiny_training import BATCHES, Model, quick, runner


@pytest.fixture(autouse=True)
def _quick():
    with quick():
        yield


class Spoil(Hook):
    """Makes chosen iterations give NaN, in one of several ways."""

    def __init__(self, way, iterations):
        self.way, self.iterations = way, iterations

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        spoilt = runner.iter in self.iterations
        runner.model.way = self.way if spoilt else None
        if spoilt and self.way == 'image':
            data_batch['inputs'][0, 0, 0, 0] = float('nan')
        if spoilt and self.way == 'weight':
            runner.model.second.weight.data[0, 0, 0, 0, 0] = float('inf')


class SpoiltModel(Model):
    way = None

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6)
        self.root = Root()

    def forward(self, inputs, mode='loss'):
        if mode != 'loss':
            return list(inputs)
        x = self.norm(self.first(inputs))
        if self.way == 'layer':
            x = self.root(x - x)
        loss = self.second(x).square().mean()
        if self.way == 'loss':
            loss = loss / 0
        if self.way == 'gradient':
            loss = loss + (loss - loss.detach()).sqrt()  # 0, with an infinite slope
        return dict(loss_box=loss, loss_other=loss * 0 if self.way == 'gradient' else loss)


class Root(nn.Module):
    """Finite inputs, and an output that is not."""

    def forward(self, x):
        return x / 0


def train(work_dir, way, iterations, **hook):
    hooks = [Spoil(way, iterations), dict(type='NonFiniteHook', **hook)]
    tiny = runner(work_dir, epochs=2, hooks=hooks, model=SpoiltModel())
    tiny.train()
    return tiny


@pytest.mark.parametrize(
    ('way', 'cause'),
    [
        ('image', 'the images themselves are not finite'),
        ('layer', r'the first layer with an output that is not finite is root \(Root\)'),
        ('weight', r'is second \(ODConv2d\), whose weights are not finite'),
        ('loss', 'all layers have finite outputs, but not loss_box, loss_other'),
    ],
)
def test_stops_and_says_where_it_began(tmp_path, way, cause):
    with pytest.raises(NonFiniteError, match=rf'iteration {BATCHES + 2} is (nan|inf): .*{cause}'):
        train(tmp_path, way, [BATCHES + 1])
    saved = torch.load(tmp_path / 'epoch_1.pth')['state_dict']
    assert all(value.isfinite().all() for value in saved.values())
    assert not (tmp_path / 'epoch_2.pth').exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """By an infinite gradient in the last iteration of an epoch, whose loss is finite."""
    with pytest.raises(NonFiniteError, match='has values that are not finite after iteration'):
        train(tmp_path, 'gradient', [2 * BATCHES - 1])
    assert (tmp_path / 'epoch_1.pth').is_file()
    assert not (tmp_path / 'epoch_2.pth').exists()


def test_skipping_leaves_nothing_of_the_iteration(tmp_path):
    hooks = [Spoil('image', [3]), dict(type='NonFiniteHook', action='skip')]
    tiny = runner(tmp_path, epochs=1, hooks=hooks, model=SpoiltModel())
    states = {}

    class Record(Hook):
        priority = 'LOWEST'

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            states[runner.iter] = copy.deepcopy(runner.model.state_dict())

    tiny.register_hook(Record())
    tiny.train()
    for name, value in states[2].items():
        if not name.endswith('temperature'):  # which follows the number of the iteration
            assert torch.equal(states[3][name], value), name
    assert all(value.isfinite().all() for value in states[4].values())
    assert not torch.equal(states[4]['first.weight'], states[3]['first.weight'])


@pytest.mark.parametrize('skipped', [[5], [8], [9], [8, 9]])
def test_a_skipped_iteration_counts_where_gradients_accumulate(tmp_path, skipped):
    """Of ten iterations, the steps are those after the fourth, the eighth and the last."""
    steps, waiting = [], {}

    class Record(Hook):
        priority = 'VERY_LOW'

        def before_train(self, runner):
            step = runner.optim_wrapper.optimizer.step
            runner.optim_wrapper.optimizer.step = lambda: (steps.append(runner.iter), step())

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            grad = runner.model.first.weight.grad
            waiting[runner.iter] = grad is not None

    hooks = [Spoil('image', skipped), Record(), dict(type='NonFiniteHook', action='skip')]
    tiny = runner(tmp_path, epochs=2, hooks=hooks, model=SpoiltModel(), accumulative_counts=4)
    tiny.train()
    assert steps == ([3, 7] if skipped == [8, 9] else [3, 7, 9])
    assert not any(waiting[i] for i in (3, 7, 9))
    assert tiny.optim_wrapper.inner_count == 10


def test_too_many_skips_in_a_row_stop(tmp_path):
    train(tmp_path / 'few', 'image', [1, 2, 4, 5], action='skip', max_skips=2)
    with pytest.raises(NonFiniteError, match='iteration 4 is nan'):
        train(tmp_path / 'many', 'image', [1, 2, 3], action='skip', max_skips=2)


def test_the_images_are_named():
    samples = [SimpleNamespace(img_path='a.jpg'), SimpleNamespace(img_path='b.jpg')]
    assert _images(dict(data_samples=samples)) == ['a.jpg', 'b.jpg']
    assert _images([torch.zeros(1)]) == []


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(action='warn'), "action .*'warn'"),
        (dict(max_skips=0), 'max_skips .*got 0'),
        (dict(max_skips='all'), "max_skips must be an integer, got 'all'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        NonFiniteHook(**options)
