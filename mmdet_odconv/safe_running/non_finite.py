"""A runner hook that keeps NaN and infinity out of the weights, and says where they began."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from .._checks import ArgumentError, check_integer
from .reading import not_finite, unwrapped


class NonFiniteError(RuntimeError):
    """The loss or the weights are NaN or infinite; no checkpoint has them."""


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Stop at a loss that is NaN or infinite, before it reaches the weights.

    The error names the iteration, the images and the first layer whose output was not finite, for
    which the forward pass is repeated. Weights that became NaN through gradients are not saved.

    Args:
        action (str): 'stop', or 'skip' to leave such iterations out. A skipped iteration changes
            neither the weights nor the running statistics of the norms. With
            ``accumulative_counts``, the other iterations before the same step count; in several
            processes, all are left out where the last of them is. Default: 'stop'.
        max_skips (int): How many iterations in a row may be left out; one more stops the training.
            Default: 10.

    Raises:
        NonFiniteError: During the training, if the loss or the weights are not finite.
    """

    priority = 'LOWEST'  # its `before_train_iter` comes after all that changes the model

    def __init__(self, action: str = 'stop', max_skips: int = 10) -> None:
        if action not in ('stop', 'skip'):
            raise ArgumentError(f"action must be 'stop' or 'skip', got {action!r}")
        self.action = action
        self.max_skips = check_integer('max_skips', max_skips, least=1)
        self._skipped = 0

    def before_train(self, runner: Runner) -> None:
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, OptimWrapper):  # not a dict of them, as generative models have
            wrapper.update_params = functools.partial(
                self._update_params, runner, wrapper.update_params
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._batch = data_batch
        if self.action == 'skip':
            self._buffers = [buffer.clone() for buffer in runner.model.buffers()]

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        broken = not_finite(unwrapped(runner.model), checkpoint['state_dict'])
        if broken:
            raise NonFiniteError(
                f'{broken[0]} has values that are not finite after iteration {runner.iter + 1}; '
                'they are not saved, and all earlier checkpoints are as they were'
            )

    def _update_params(
        self, runner: Runner, update: Callable[..., None], loss: Tensor, *args: Any, **kwargs: Any
    ) -> None:
        """What the optimizer wrapper does with a loss, if the loss is finite in all processes."""
        if self._is_finite_everywhere(loss):
            self._skipped = 0
            update(loss, *args, **kwargs)
            return
        message = (
            f'the loss of iteration {runner.iter + 1} is {loss.item()}: {self._cause(runner)}; '
            f'images: {", ".join(_images(self._batch)) or "unknown"}'
        )
        if _is_finite(loss):
            message = f'the loss of iteration {runner.iter + 1} is not finite in another process'
        if self.action == 'stop' or self._skipped == self.max_skips:
            raise NonFiniteError(f'{message}; all checkpoints are as they were')
        self._skipped += 1
        print_log(f'{message}; skipped', logger='current', level=logging.WARNING)
        self._count(runner.optim_wrapper)
        with torch.no_grad():
            for buffer, before in zip(runner.model.buffers(), self._buffers, strict=True):
                buffer.copy_(before)

    def _count(self, wrapper: Any) -> None:
        """Count an iteration without a backward pass, in which gradients may wait for a step."""
        wrapper._inner_count += 1  # as its `backward` does
        groups = wrapper.optimizer.param_groups
        pending = any(p.grad is not None for group in groups for p in group['params'])
        if wrapper.should_update() and pending:
            # Of several processes, only a backward pass would have brought the gradients together.
            if get_world_size() == 1:
                wrapper.step()
            wrapper.zero_grad()

    def _is_finite_everywhere(self, loss: Tensor) -> bool:
        finite = loss.detach().isfinite().all().float()
        if get_world_size() > 1:  # processes that do not step together wait for each other
            all_reduce(finite, 'min')
        return bool(finite.item())

    @torch.no_grad()
    def _cause(self, runner: Runner) -> str:
        """Repeat the forward pass and look at every module's output."""
        model: Any = unwrapped(runner.model)
        # All processes go through the whole of it, because they may wait for each other within it.
        with _first_non_finite(model) as found, runner.optim_wrapper.optim_context(runner.model):
            data = model.data_preprocessor(self._batch, True)
            kwargs = data if isinstance(data, dict) else {}
            losses = model(**kwargs, mode='loss') if kwargs else model(*data, mode='loss')
        if not _is_finite(kwargs.get('inputs')):
            return 'the images themselves are not finite'
        if found:
            return f'the first layer with an output that is not finite is {found[0]}'
        names = [name for name, value in losses.items() if not _is_finite(value)]
        if names:
            return f'all layers have finite outputs, but not {", ".join(names)}'
        return 'not so when computed once more'


@contextmanager
def _first_non_finite(model: nn.Module) -> Iterator[list[str]]:
    """A list that gets the names of the modules with outputs that are not finite, in order."""
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not _is_finite(output):
            own = list(module.parameters(recurse=False))
            why = '' if _is_finite(own) else ', whose weights are not finite'
            found.append(f'{name} ({type(module).__name__}){why}')

    handles = [
        module.register_forward_hook(functools.partial(look, name))
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(value: Any) -> bool:
    """Whether all numbers in tensors, in lists and dicts of them, and so on, are finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(_is_finite(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_finite(item) for item in value)
    return True


def _images(batch: Any) -> list[str]:
    """The image files of a batch, as mmdet's data samples name them."""
    samples = batch.get('data_samples') if isinstance(batch, dict) else None
    return [sample.img_path for sample in samples or () if hasattr(sample, 'img_path')]
