import itertools
from types import SimpleNamespace

import pytest
import torch
from mmdet.datasets.samplers import AspectRatioBatchSampler
from mmengine.dataset import InfiniteSampler
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Dataset, IterableDataset

from mmdet_odconv import ODConv2d, ODConvTemperatureHook
from mmdet_odconv.training import annealed_temperature
from tests.conftest import ROOT, load_cases

IMAGES, BATCH = 6, 2


class Images(Dataset):
    def __len__(self):
        return IMAGES

    def __getitem__(self, index):
        return {'inputs': torch.full((4, 6, 6), float(index))}


class CocoLike(Images):
    """What mmdet's samplers ask of a data set of images."""

    metainfo = dict(classes=('a', 'b'))

    def get_data_info(self, index):
        size = dict(width=9 + index % 2, height=9)
        return dict(size, images=[size])

    def get_cat_ids(self, index):
        return [index % 2]


class Concatenated(ConcatDataset):
    """Six images, of two data sets."""

    def __init__(self):
        super().__init__([torch.utils.data.Subset(CocoLike(), range(3)) for _ in range(2)])
        for dataset in self.datasets:
            dataset.get_data_info = dataset.dataset.get_data_info
        self.get_data_info = self.datasets[0].get_data_info

    def get_dataset_source(self, index):
        return index // 3


class Model(BaseModel):
    """Records the temperature of every training step."""

    def __init__(self, conv=None):
        super().__init__()
        self.conv = conv or ODConv2d(4, 4, 3)
        self.seen = []

    def forward(self, inputs, mode='loss'):
        self.seen.append(getattr(self.conv, 'temperature', None))
        return {'loss': self.conv(inputs).square().mean()}


def run(work_dir, hook, epochs=4, model=None, by_iter=0, dataloader=None, **kwargs):
    loop = dict(by_epoch=True, max_epochs=epochs)
    sampler = dict(type='DefaultSampler', shuffle=False)
    if by_iter:
        loop = dict(by_epoch=False, max_iters=by_iter)
        sampler = dict(type='InfiniteSampler', shuffle=False)
    dataloader = dict(dataset=Images(), batch_size=BATCH, sampler=sampler) | (dataloader or {})
    runner = Runner(
        model=model or Model(),
        work_dir=str(work_dir),
        train_dataloader=dict(dataloader, collate_fn=dict(type='default_collate')),
        train_cfg=loop,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        custom_hooks=[dict(type='ODConvTemperatureHook', **hook)],
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=not by_iter),
            logger=dict(type='LoggerHook', interval=1),
        ),
        default_scope='mmengine',
        experiment_name=f'{work_dir.parent.name}-{work_dir.name}',
        **kwargs,
    )
    runner.train()
    return runner


def published(n, total, initial=30.0):
    return 1 + max(0, (initial - 1) * (total - n) / total)


def test_every_iteration_has_the_published_temperature(tmp_path):
    runner = run(tmp_path / 'a', dict(anneal_epochs=2))
    assert runner.model.seen == pytest.approx([published(n, 6) for n in range(1, 13)])
    assert runner.model.seen[5:] == [1.0] * 7


def test_it_is_logged(tmp_path):
    runner = run(tmp_path / 'a', dict(anneal_epochs=2))
    scalars = runner.message_hub.get_scalar('train/odconv_temperature').data[0]
    assert list(scalars) == pytest.approx(runner.model.seen)
    log = next((tmp_path / 'a').glob('*/vis_data/scalars.json')).read_text()
    assert '"odconv_temperature": ' in log


def test_a_resumed_run_goes_on_where_it_would_have_been(tmp_path):
    run(tmp_path / 'a', dict(anneal_epochs=3), epochs=2)
    checkpoint = tmp_path / 'a' / 'epoch_1.pth'
    runner = run(tmp_path / 'b', dict(anneal_epochs=3), load_from=str(checkpoint), resume=True)
    assert runner.model.seen == pytest.approx([published(n, 9) for n in range(4, 13)])


@pytest.mark.parametrize('hook', [dict(anneal_epochs=2), dict(anneal_iters=6)])
def test_runs_by_iteration(tmp_path, hook):
    runner = run(tmp_path / 'a', hook, by_iter=8)
    assert runner.model.seen == pytest.approx([published(n, 6) for n in range(1, 9)])


SAMPLERS = {
    'infinite': (CocoLike, dict(type='InfiniteSampler')),
    'default': (CocoLike, dict(type='DefaultSampler')),
    'class-aware': (CocoLike, dict(type='mmdet.ClassAwareSampler')),
    'multi-source': (
        Concatenated,
        dict(type='mmdet.MultiSourceSampler', batch_size=BATCH, source_ratio=[1, 1]),
    ),
    'group-multi-source': (
        Concatenated,
        dict(type='mmdet.GroupMultiSourceSampler', batch_size=BATCH, source_ratio=[1, 1]),
    ),
    'multi-data': (Concatenated, dict(type='mmdet.MultiDataSampler', dataset_ratio=[1, 1])),
    'custom-size': (
        Concatenated,
        dict(type='mmdet.CustomSampleSizeSampler', dataset_size=[3, -1]),
    ),
}


@pytest.mark.parametrize('sampler', SAMPLERS)
@pytest.mark.parametrize(
    'batch_sampler',
    [
        None,
        dict(type='mmdet.AspectRatioBatchSampler'),
        dict(type='mmdet.AspectRatioBatchSampler', drop_last=True),
        dict(type='mmdet.TrackAspectRatioBatchSampler'),
    ],
)
def test_runs_by_iteration_with_every_sampler(tmp_path, sampler, batch_sampler):
    dataset, sampler = SAMPLERS[sampler]
    dataloader = dict(dataset=dataset(), sampler=sampler, batch_sampler=batch_sampler)
    runner = run(tmp_path / 'a', dict(anneal_epochs=2), by_iter=2, dataloader=dataloader)
    assert runner.model.seen == pytest.approx([published(n, 6) for n in (1, 2)])


MULTI_DATA = dict(
    dataset=Concatenated(),
    batch_size=[1, 2],
    batch_sampler=dict(type='mmdet.MultiDataAspectRatioBatchSampler', num_datasets=2),
)


def test_runs_by_iteration_with_a_batch_size_for_each_data_set(tmp_path):
    dataloader = dict(MULTI_DATA, sampler=dict(type='DefaultSampler'))
    runner = run(tmp_path / 'a', dict(anneal_epochs=2), by_iter=2, dataloader=dataloader)
    assert runner.model.seen == pytest.approx([published(n, 2 * (3 + 1)) for n in (1, 2)])


class Unending(IterableDataset):
    def __iter__(self):
        while True:
            yield Images()[0]


@pytest.mark.parametrize(
    ('dataloader', 'name'),
    [
        (MULTI_DATA, 'MultiDataAspectRatioBatchSampler'),
        (dict(dataset=Unending(), sampler=None), 'BatchSampler'),
    ],
)
def test_a_loader_that_does_not_tell_the_length_of_a_pass(tmp_path, dataloader, name):
    match = rf'how many iterations .*{name}.* set anneal_iters instead of anneal_epochs'
    with pytest.raises(ValueError, match=match):
        run(tmp_path / 'a', dict(anneal_epochs=2), by_iter=2, dataloader=dataloader)
    # Not a whole run: MMEngine's own LoggerHook asks for the length, and waits for ever.
    runner = SimpleNamespace(model=Model(), train_loop=SimpleNamespace(dataloader=None), iter=0)
    ODConvTemperatureHook(anneal_iters=6).before_train(runner)
    assert runner.model.conv.temperature == pytest.approx(published(1, 6))


@pytest.mark.parametrize('batch_sampler', [BatchSampler, AspectRatioBatchSampler])
def test_the_processes_of_a_distributed_run_share_a_pass(batch_sampler):
    dataset = CocoLike()
    batches = batch_sampler(InfiniteSampler(dataset), batch_size=1, drop_last=False)
    runner = SimpleNamespace(
        model=Model(),
        train_loop=SimpleNamespace(dataloader=DataLoader(dataset, batch_sampler=batches)),
        world_size=2,
        iter=0,
    )
    ODConvTemperatureHook(anneal_epochs=2).before_train(runner)
    assert runner.model.conv.temperature == pytest.approx(published(1, 6))


def test_inverse_schedule(tmp_path):
    runner = run(tmp_path / 'a', dict(anneal_epochs=2, schedule='inverse'), epochs=2)
    inverses = [1 / t for t in runner.model.seen]
    assert inverses == pytest.approx([1 / 30 + 29 / 30 * n / 6 for n in range(1, 7)])


def test_a_checkpoint_saved_midway_is_tested_at_its_temperature(tmp_path):
    runner = run(tmp_path / 'a', dict(anneal_epochs=3), epochs=2)
    path = tmp_path / 'a' / 'epoch_1.pth'
    other = Model()
    Runner(
        model=other,
        work_dir=str(tmp_path / 'b'),
        default_scope='mmengine',
        experiment_name=f'{tmp_path.name}-load',
    ).load_checkpoint(str(path))
    assert other.conv.temperature == pytest.approx(published(3, 9))
    assert runner.model.conv.temperature == pytest.approx(published(6, 9))


def test_a_model_without_odconv_is_warned_about(tmp_path, caplog):
    runner = run(tmp_path / 'a', {}, epochs=1, model=Model(nn.Conv2d(4, 4, 3)))
    log = next((tmp_path / 'a').glob('*/*.log')).read_text()
    assert 'the model has no ODConv layer' in log
    assert runner.iter == 3


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (dict(initial=0.5), 'initial.*got 0.5'),
        (dict(anneal_epochs=-1), 'anneal_epochs.*got -1'),
        (dict(anneal_iters=-2), 'anneal_iters.*got -2'),
        (dict(anneal_epochs=None), 'anneal_epochs must be an integer, got None'),
        (dict(initial=float('inf')), 'initial must be finite, got inf'),
        (dict(schedule='cosine'), "'cosine'"),
    ],
)
def test_bad_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        ODConvTemperatureHook(**args)


def test_linear_schedule_is_the_published_one():
    for case in load_cases(ROOT / 'tests/data/temperature.json'):
        done = case['epoch'] * case['iters_per_epoch'] + case['iteration']
        total = case['temp_epoch'] * case['iters_per_epoch']
        actual = annealed_temperature(done, total, case['temp_init'])
        assert actual == pytest.approx(case['temperature'], rel=1e-12), case


def test_inverse_schedule_takes_equal_steps_of_the_inverse():
    inverses = [1 / annealed_temperature(n, 10, 30.0, 'inverse') for n in range(12)]
    steps = [b - a for a, b in itertools.pairwise(inverses)]
    assert inverses[0] == pytest.approx(1 / 30)
    assert steps[:10] == pytest.approx([(1 - 1 / 30) / 10] * 10)
    assert inverses[10] == inverses[11] == 1


def test_no_annealing_and_unknown_schedule():
    assert annealed_temperature(1, 0, 30.0) == 1.0
    with pytest.raises(ValueError, match="'cosine'"):
        annealed_temperature(1, 10, 30.0, 'cosine')
