"""A runner hook that watches the attentions of a model's ODConv layers in training."""

from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from .._checks import ArgumentError, check_integer, check_number
from ..analysis import DYNAMIC, AttentionMeter, AttentionStatistics, odconv_layers
from ..safe_running import unwrapped


@HOOKS.register_module()
class ODConvAttentionHook(Hook):
    """Log how much the attentions depend on the image, and warn of layers where they do not.

    In the config::

        custom_hooks = [dict(type='ODConvAttentionHook', interval=100)]

    Every ``interval`` iterations the hook looks at the attentions of the images in that iteration,
    and of the following iterations if these are fewer than ``images``. At other times it does
    nothing. It logs the scalars ``odconv_channel_std``, ``odconv_filter_std``,
    ``odconv_spatial_std``, ``odconv_kernel_std``, ``odconv_kernel_entropy`` and
    ``odconv_kernel_similarity`` as means over the layers, and ``odconv_saturated`` as the maximum
    over layers and attentions. :class:`~mmdet_odconv.analysis.AttentionStatistics` defines them,
    and docs/analysis.md says which values are usual.

    Args:
        interval (int): Number of iterations between two looks. Default: 100.
        images (int): The least number of images for a look, over all processes. Default: 8.
        per_layer (bool): Whether the visualiser's backends (TensorBoard and others) get the
            scalars of each layer too, such as ``odconv_kernel_std/backbone.layer1.0.conv1``. The
            text log stays as it is. Default: False.
        warn_after (int): From this iteration on, the hook warns once of each layer whose attentions
            do not depend on the image or are saturated. Default: 1000.
        min_std (float): The attentions of a layer depend on the image if one of them has at least
            this standard deviation over the images. Default: 0.003, as in
            :func:`~mmdet_odconv.collapse_static_layers`.
        max_saturated (float): An attention is saturated if more than this share of its values is
            within 0.01 of 0 or 1. Default: 0.9.

    Raises:
        ValueError: An argument is out of its range. The message names it and its value.
    """

    def __init__(
        self,
        interval: int = 100,
        images: int = 8,
        per_layer: bool = False,
        warn_after: int = 1000,
        min_std: float = DYNAMIC,
        max_saturated: float = 0.9,
    ) -> None:
        check_integer('interval', interval, least=1)
        check_integer('images', images, least=2)
        check_integer('warn_after', warn_after, least=0)
        for name, limit in (('min_std', min_std), ('max_saturated', max_saturated)):
            if not 0 <= check_number(name, limit) <= 1:
                raise ArgumentError(f'{name} must be between 0 and 1, got {limit}')
        self.interval = interval
        self.images = images
        self.per_layer = per_layer
        self.warn_after = warn_after
        self.min_std = min_std
        self.max_saturated = max_saturated

    def before_train(self, runner: Runner) -> None:
        self._meter: AttentionMeter | None = None
        self._warned: set[tuple[str, str]] = set()
        self._temperatures: dict[str, float] = {}
        try:
            self._layers = odconv_layers(runner.model)
        except ValueError as error:
            runner.logger.warning(f'ODConvAttentionHook: {error}')
            self._layers = {}

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        if self._layers and self._meter is None and self.every_n_train_iters(runner, self.interval):
            self._meter = AttentionMeter(runner.model)
        if self._meter is not None:
            self._meter.open()
            # Not later than the forward pass: in the backward pass, checkpointed blocks
            # (with_cp) are computed a second time.
            self._handle = unwrapped(runner.model).register_forward_hook(self._close)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: object = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        if self._meter is None:
            return
        self._close()
        self._handle.remove()
        # The processes must agree on whether the look ends here.
        samples = torch.tensor(float(self._meter.samples))
        all_reduce(samples)
        if 0 < samples < self.images:
            return
        meter, self._meter = self._meter, None
        meter.all_reduce()
        statistics = meter.statistics()
        if statistics:
            self._log(runner, statistics)
            if runner.iter + 1 >= self.warn_after:
                self._warn(runner, statistics)
        elif self._is_new('', 'unseen'):
            runner.logger.warning(
                f'ODConvAttentionHook: iteration {runner.iter + 1} used none of the '
                f'{len(self._layers)} ODConv layers, or the model is compiled and hides them'
            )
        self._temperatures = {name: layer.temperature for name, layer in self._layers.items()}

    def _close(self, *args: Any) -> None:
        if self._meter is not None:
            self._meter.close()

    def _log(self, runner: Runner, statistics: list[AttentionStatistics]) -> None:
        scalars = {record.name: _scalars(record) for record in statistics}
        columns: dict[str, list[float]] = {}
        for of_layer in scalars.values():
            for key, value in of_layer.items():
                columns.setdefault(key, []).append(value)
        for key, values in columns.items():
            value = max(values) if key == 'odconv_saturated' else sum(values) / len(values)
            runner.message_hub.update_scalar(f'train/{key}', value)
        if self.per_layer:
            runner.visualizer.add_scalars(
                {
                    f'{key}/{name}': value
                    for name, of_layer in scalars.items()
                    for key, value in of_layer.items()
                },
                step=runner.iter + 1,
            )

    def _warn(self, runner: Runner, statistics: list[AttentionStatistics]) -> None:
        static, saturated = [], []
        for record in statistics:
            name = record.name
            if self._is_static(record) and self._is_new(name, 'static'):
                own = self._layers[name].attention_parameters().values()
                frozen = not any(parameter.requires_grad for parameter in own)
                static.append(f'{name} (frozen)' if frozen else name)
            which = [n for n, share in record.saturated.items() if share > self.max_saturated]
            if which and self._is_new(name, 'saturated'):
                saturated.append(f'{name} ({", ".join(which)})')
        start = f'ODConvAttentionHook: after {runner.iter + 1} iterations'
        if static:
            runner.logger.warning(
                f'{start} the attentions of these ODConv layers hardly depend on the image '
                f'(standard deviation below {self.min_std:g}), so each computes what a plain '
                f'convolution does: {_listed(static)}; docs/analysis.md says what to do'
            )
        if saturated:
            runner.logger.warning(
                f'{start} these ODConv layers have saturated attentions (more than '
                f'{self.max_saturated:.0%} of the values are almost 0 or 1), which hardly learn '
                f'any more: {_listed(saturated)}; docs/analysis.md says what to do'
            )

    def _is_new(self, name: str, reason: str) -> bool:
        """Whether a layer was not warned of for this reason, which it is from now on."""
        new = (name, reason) not in self._warned
        self._warned.add((name, reason))
        return new

    def _is_static(self, record: AttentionStatistics) -> bool:
        # While it is annealed, a high temperature holds all attentions together.
        temperature = self._layers[record.name].temperature
        settled = self._temperatures.get(record.name) == temperature
        # A layer without an attention was asked for as it is.
        return settled and bool(record.std) and record.largest_std < self.min_std


def _listed(names: list[str], most: int = 5) -> str:
    others = f' and {len(names) - most} others' if len(names) > most else ''
    return ', '.join(names[:most]) + others


def _scalars(record: AttentionStatistics) -> dict[str, float]:
    """The scalars to log of one layer; those that it does not have are left out."""
    scalars = {f'odconv_{name}_std': std for name, std in record.std.items()}
    for name in ('kernel_entropy', 'kernel_similarity'):
        value = getattr(record, name)
        if value is not None:
            scalars[f'odconv_{name}'] = value
    if record.saturated:
        scalars['odconv_saturated'] = max(record.saturated.values())
    return scalars
