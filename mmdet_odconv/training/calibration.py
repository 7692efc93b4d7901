"""A runner hook that keeps the statistics of the attentions' norms up to date in training."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..layers.calibrated_norm import Calibration
from ..safe_running import unwrapped


@HOOKS.register_module()
class ODConvCalibrationHook(Hook):
    """Let the images of each training iteration into the statistics of ``CalibratedNorm`` layers.

    In the config::

        custom_hooks = [dict(type='ODConvCalibrationHook')]

    The hook watches the model's forward pass and moves the statistics after the iteration, once
    for each batch, whatever the optimizer does with it. All processes get the same statistics. A
    backward pass that computes layers again (``with_cp``) is not watched.
    """

    priority = 'ABOVE_NORMAL'  # before a copy of the weights (EMAHook) is made

    def before_train(self, runner: Runner) -> None:
        self._calibration = Calibration(runner.model)
        if not self._calibration.norms:
            runner.logger.warning(
                'ODConvCalibrationHook has nothing to do: the model has no CalibratedNorm'
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        self._calibration.open()
        # Not later than the forward pass, for the sake of checkpointed blocks.
        self._handle = unwrapped(runner.model).register_forward_hook(self._close)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: object = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        self._close()
        self._handle.remove()
        self._calibration.update()

    def _close(self, *args: Any) -> None:
        self._calibration.close()
