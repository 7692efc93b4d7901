"""A runner hook that anneals the temperature of a model's ODConv layers."""

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner

from ..functional import annealed_temperature
from ..layers import set_temperature


@HOOKS.register_module()
class ODConvTemperatureHook(Hook):
    """Anneal the temperature from ``initial`` to 1, as the paper does in the first epochs.

    The temperature is set before each iteration from the iteration's number alone, so a resumed
    run is at once where it would have been. It is logged as the scalar
    ``odconv_temperature``. A checkpoint carries it in the state dict's metadata: testing one that
    was saved midway uses the temperature of that moment.

    Args:
        initial (float): T₀. Default: 30.0, as published.
        anneal_epochs (int): Epochs until T = 1. In a run by iterations an epoch is one pass over
            the training data. Default: 10, as published.
        anneal_iters (int, optional): Iterations until T = 1, in place of ``anneal_epochs``.
            Default: None.
        schedule (str): 'linear' as published, or 'inverse', linear in 1/T. Default: 'linear'.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        initial: float = 30.0,
        anneal_epochs: int = 10,
        anneal_iters: int | None = None,
        schedule: str = 'linear',
    ) -> None:
        if not initial >= 1:
            raise ValueError(f'initial must be at least 1, got {initial}')
        for name, value in (('anneal_epochs', anneal_epochs), ('anneal_iters', anneal_iters)):
            if value is not None and value < 0:
                raise ValueError(f'{name} must not be negative, got {value}')
        annealed_temperature(1, 1, initial, schedule)  # refuses an unknown schedule now
        self.initial = initial
        self.anneal_epochs = anneal_epochs
        self.anneal_iters = anneal_iters
        self.schedule = schedule

    def before_train(self, runner: Runner) -> None:
        if set_temperature(runner.model, self._temperature(runner)) == 0:
            runner.logger.warning(
                'ODConvTemperatureHook: the model has no ODConv layer, nothing is annealed'
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        temperature = self._temperature(runner)
        set_temperature(runner.model, temperature)
        runner.message_hub.update_scalar('train/odconv_temperature', temperature)

    def _temperature(self, runner: Runner) -> float:
        total = self.anneal_iters
        if total is None:
            total = self.anneal_epochs * _iters_per_epoch(runner)
        return annealed_temperature(runner.iter + 1, total, self.initial, self.schedule)


def _iters_per_epoch(runner: Runner) -> int:
    loop = runner.train_loop
    if isinstance(loop, EpochBasedTrainLoop):
        return len(loop.dataloader)
    # An InfiniteSampler has no end, but its data set has a size.
    dataloader = loop.dataloader
    return -(-len(dataloader.dataset) // (dataloader.batch_size * runner.world_size))
