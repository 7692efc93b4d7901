"""A training of a second or two on MMEngine's runner, for tests of what can happen to it.

All generators are drawn from: by the data set, by the dropout and by the validation.
"""

import multiprocessing.util
import random
import time
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
import torch._dynamo  # which else each child process imports by itself
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.utils import ManagerMixin
from torch import nn
from torch.utils.data import Dataset

from mmdet_odconv import ODConv2d
from mmdet_odconv.safe_running import latest_checkpoint

IMAGES, BATCH = 10, 2
BATCHES = IMAGES // BATCH


class Images(Dataset):
    metainfo = dict(classes=('a',))

    def __len__(self):
        return IMAGES

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(4, 6, 6)
        return dict(inputs=torch.full((4, 6, 6), float(index)) + noise)


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.first = ODConv2d(4, 6, 3, norm_cfg=dict(type='BN'))
        self.dropout = nn.Dropout(0.3)
        self.second = ODConv2d(6, 2, 3)

    def forward(self, inputs, mode='loss'):
        x = self.second(self.dropout(self.first(inputs)))
        return dict(loss=x.square().mean()) if mode == 'loss' else list(x)


class Draws(BaseMetric):
    """A metric that draws as some do, and is better each time."""

    def process(self, data_batch, data_samples):
        torch.rand(3)
        np.random.rand(3)
        self.results += [0] * len(data_samples)

    def compute_metrics(self, results):
        return dict(acc=MessageHub.get_current_instance().get_info('iter'))


def runner(work_dir, epochs=4, resume=False, hooks=(), checkpoint=None, **options):
    """A runner with :class:`SafeCheckpointHook`, or one that goes on in ``work_dir``."""
    by_epoch = 'max_iters' not in options
    loop = dict(by_epoch=by_epoch, max_epochs=epochs)
    sampler = dict(type='DefaultSampler', shuffle=True)
    if not by_epoch:
        loop = dict(by_epoch=False, max_iters=options['max_iters'], val_interval=BATCHES)
        sampler = dict(type='InfiniteSampler', shuffle=True)
    loader = dict(
        dataset=Images(),
        batch_size=options.get('batch_size', BATCH),
        collate_fn=dict(type='default_collate'),
        num_workers=options.get('num_workers', 0),
        persistent_workers=options.get('persistent_workers', False),
    )
    hook = dict(type='SafeCheckpointHook', interval=1, by_epoch=by_epoch, save_best='acc')
    hook |= dict(rule='greater', max_keep_ckpts=2) | (checkpoint or {})
    latest = latest_checkpoint(str(work_dir)) if resume else None
    return Runner(
        model=options.get('model', Model()),
        work_dir=str(work_dir),
        train_dataloader=dict(loader, sampler=sampler),
        train_cfg=loop,
        optim_wrapper=dict(
            optimizer=dict(type='SGD', lr=options.get('lr', 0.01), momentum=0.9),
            accumulative_counts=options.get('accumulative_counts', 1),
        ),
        param_scheduler=dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=15),
        val_dataloader=dict(loader, sampler=dict(type='DefaultSampler', shuffle=False)),
        val_cfg=dict(),
        val_evaluator=Evaluator(Draws()),
        custom_hooks=[dict(type='ODConvTemperatureHook', anneal_iters=12), *hooks],
        default_hooks=dict(checkpoint=hook, logger=dict(type='LoggerHook', interval=1)),
        randomness=dict(seed=0) | options.get('randomness', {}),
        launcher=options.get('launcher', 'none'),
        cfg=dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None)),
        load_from=latest.path if latest else None,
        resume=latest is not None,
        experiment_name=f'{work_dir}-{time.time_ns()}',
    )


@contextmanager
def quick():
    """Leave out what takes most of the time of so small a run.

    This is the list of versions, and laying out the config for each checkpoint.
    """

    def unformatted(text, **_):
        return text, True

    with (
        mock.patch('mmengine.runner.runner.collect_env', return_value={}),
        mock.patch('mmengine.config.config.FormatCode', unformatted, create=True),
        # where the onedl line's MMEngine gets it from at each call
        mock.patch('yapf.yapflib.yapf_api.FormatCode', unformatted),
    ):
        yield


def weights_of(path):
    """The weights, with the temperature, that a checkpoint has."""
    return torch.load(path, map_location='cpu')['state_dict']


def assert_equal_bit_for_bit(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


class InChild:
    """A call in a forked process, which may be killed.

    Args:
        function (Callable): What is called.
        *args, **kwargs: Its arguments.
    """

    def __init__(self, function, *args, **kwargs):
        self.process = multiprocessing.get_context('fork').Process(
            target=self._call, args=(function, args, kwargs)
        )
        self.process.start()
        # Python waits at its own end for the processes that it has started.
        multiprocessing.util.Finalize(None, self.process.kill, exitpriority=0)

    @staticmethod
    def _call(function, args, kwargs):
        # A new process has none of MMEngine's instances, such as the visualizer of another test.
        kinds = [ManagerMixin]
        while kinds:
            kind = kinds.pop()
            kind._instance_dict.clear()
            kinds += kind.__subclasses__()
        with quick():
            function(*args, **kwargs)

    def wait(self):
        """The exit status of the process, or minus the signal that ended it."""
        self.process.join()  # for as long as pytest lets a test take
        return self.process.exitcode
