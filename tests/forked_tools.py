"""The tools in processes forked from the tests', so that none has to import MMDetection again."""

import resource
from functools import partial

import torch
from mmdet.utils import register_all_modules

from tests.conftest import ROOT
from tests.test_tools.test_train_and_test import CONFIG, SMALL, run_in_this_process
from tests.tiny_training import InChild

OPTIONS = [*SMALL, 'train_dataloader.batch_size=2']
EPOCHS, BATCHES = 4, 6


def run(name, log, args, shapes, file_size=None, trusting=False):
    """One of the tools, as its own process would be; its output goes to a file.

    With ``trusting``, ``torch.load`` runs what a file asks for unless it is told not to, as it
    does before torch 2.6.
    """
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if trusting:
        torch.load = partial(torch.load, weights_only=False)
    run_in_this_process(name, args, ROOT, dict(SHAPES_ROOT=str(shapes)), log)


class Tools:
    """The tools on a folder of generated images.

    Args:
        root (Path): Where logs go.
        shapes (Path): The images, which :meth:`make_images` makes.
    """

    def __init__(self, root, shapes):
        self.root, self.shapes = root, shapes
        self.config = root / 'config.py'
        self.config.write_text(
            f'_base_ = {str(ROOT / CONFIG)!r}\n'
            "custom_hooks = [dict(type='ODConvTemperatureHook', anneal_iters=20)]\n"
        )

    @classmethod
    def with_images(cls, root, train, val):
        """The tools, once so many images have been made in the folder."""
        register_all_modules(init_default_scope=False)
        tools = cls(root, root / 'shapes')
        tools.make_images(train, val)
        return tools

    def make_images(self, train, val):
        numbers = ['--train', train, '--val', val, '--size', 64, 64]
        args = (
            'study/make_shapes_dataset.py',
            self.root / 'log',
            [self.shapes, *numbers],
            self.shapes,
        )
        assert InChild(run, *args).wait() == 0, self.log()

    def start(self, name, *args, options=(), **kwargs):
        args = [*args, '--cfg-options', *OPTIONS, *options]
        return InChild(run, name, self.root / 'log', args, self.shapes, **kwargs)

    def train(self, work_dir, *args, epochs=EPOCHS, disturb=None, **kwargs):
        """Train and return the exit status."""
        options = [f'train_cfg.max_epochs={epochs}', *kwargs.pop('options', ())]
        if disturb:
            keys = ('iterations', 'seconds', 'number')
            options += ['default_hooks.disturb.type=DisturbHook']
            options += [
                f'default_hooks.disturb.{key}={value}'
                for key, value in zip(keys, disturb, strict=True)
            ]
        work = ['--work-dir', work_dir]
        return self.start('train.py', self.config, *work, *args, options=options, **kwargs).wait()

    def log(self):
        return (self.root / 'log').read_text()

    def last_line(self):
        return self.log().strip().rpartition('\n')[2]
