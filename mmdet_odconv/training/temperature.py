"""A runner hook that anneals the temperature of a model's ODConv layers."""

import math

from mmdet.datasets.samplers import MultiSourceSampler
from mmengine.dataset import InfiniteSampler
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from .._checks import ArgumentError, check_integer, check_number
from ..layers import set_temperature

# They start over in the middle of a batch, so that no data loader ever comes to its end.
_ENDLESS_SAMPLERS = (InfiniteSampler, MultiSourceSampler)


def annealed_temperature(
    iteration: int, anneal_iters: int, initial: float, schedule: str = 'linear'
) -> float:
    """The temperature T of one training iteration, falling from ``initial`` to 1.

    'linear' is the published schedule, T = 1 + max(0, (T₀ - 1)·(N - n)/N). The factor 1/T, which
    scales the logits, rises steeply at its end; 'inverse', which is ours, raises 1/T in equal
    steps.

    Args:
        iteration (int): n, counted from 1 for the first iteration.
        anneal_iters (int): N, the number of iterations until T = 1; 0 means no annealing.
        initial (float): T₀, the temperature at n = 0.
        schedule (str): 'linear' in T, or 'inverse', linear in 1/T. Default: 'linear'.

    Raises:
        ValueError: The schedule is neither of the two.
    """
    if schedule not in ('linear', 'inverse'):
        raise ArgumentError(f"schedule must be 'linear' or 'inverse', got {schedule!r}")
    if iteration >= anneal_iters:
        return 1.0
    remaining = (anneal_iters - iteration) / anneal_iters
    if schedule == 'linear':
        return 1.0 + (initial - 1.0) * remaining
    return 1.0 / (1.0 + (1.0 / initial - 1.0) * remaining)


@HOOKS.register_module()
class ODConvTemperatureHook(Hook):
    """Anneal the temperature from ``initial`` to 1, as the paper does in the first epochs.

    The temperature is set before each iteration and depends only on the number of that iteration,
    so a resumed run continues where it stopped. The hook logs it as the scalar
    ``odconv_temperature``. A checkpoint stores the temperature at which it was saved, and testing
    the checkpoint uses that temperature.

    Args:
        initial (float): T₀, the temperature at the start. Default: 30.0, as published.
        anneal_epochs (int): Number of epochs until T = 1. In an iteration-based training loop, an
            epoch is one pass over the training data. Default: 10, as published.
        anneal_iters (int, optional): Number of iterations until T = 1. If it is given,
            ``anneal_epochs`` is ignored. Default: None.
        schedule (str): 'linear', as published, or 'inverse', which is linear in 1/T.
            Default: 'linear'.

    Raises:
        ValueError: An argument is out of its range. The training raises it at its start, too, if
            ``anneal_epochs`` is used and the train dataloader does not tell how many iterations
            one pass over its data takes.
    """

    def __init__(
        self,
        initial: float = 30.0,
        anneal_epochs: int = 10,
        anneal_iters: int | None = None,
        schedule: str = 'linear',
    ) -> None:
        if not check_number('initial', initial) >= 1:
            raise ArgumentError(f'initial must be at least 1, got {initial}')
        if anneal_iters is None:
            check_integer('anneal_epochs', anneal_epochs, least=0)
        else:
            check_integer('anneal_iters', anneal_iters, least=0)
        annealed_temperature(1, 1, initial, schedule)  # refuses an unknown schedule now
        self.initial = initial
        self.anneal_epochs = anneal_epochs
        self.anneal_iters = anneal_iters
        self.schedule = schedule

    def before_train(self, runner: Runner) -> None:
        # Only once: the length of some batch samplers is found by iterating over all the data.
        self._total_iters = (
            self.anneal_epochs * _iters_per_epoch(runner)
            if self.anneal_iters is None
            else self.anneal_iters
        )
        if set_temperature(runner.model, self._temperature(runner)) == 0:
            runner.logger.warning(
                'ODConvTemperatureHook: the model has no ODConv layer, so there is no temperature '
                'to anneal'
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        temperature = self._temperature(runner)
        set_temperature(runner.model, temperature)
        runner.message_hub.update_scalar('train/odconv_temperature', temperature)

    def _temperature(self, runner: Runner) -> float:
        return annealed_temperature(runner.iter + 1, self._total_iters, self.initial, self.schedule)


def _iters_per_epoch(runner: Runner) -> int:
    """The iterations of one pass over the training data.

    Raises:
        ValueError: The train dataloader does not tell.
    """
    dataloader = runner.train_loop.dataloader
    # With one of mmdet's batch samplers, the loader's own `batch_size` and `sampler` mean nothing.
    batch_sampler = dataloader.batch_sampler
    if isinstance(getattr(batch_sampler, 'sampler', None), _ENDLESS_SAMPLERS):
        batch_size = getattr(batch_sampler, 'batch_size', None)
        if isinstance(batch_size, int):
            return math.ceil(len(dataloader.dataset) / (batch_size * runner.world_size))
    else:
        try:
            return len(dataloader)
        except TypeError:  # an iterable data set, or a sampler without a length
            pass
    raise ValueError(
        'ODConvTemperatureHook cannot tell how many iterations one pass over the training data '
        f'takes (the batch sampler is {type(batch_sampler).__name__}): set anneal_iters instead '
        'of anneal_epochs'
    )
