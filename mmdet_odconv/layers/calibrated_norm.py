"""A norm for attentions whose statistics no forward pass moves, and their calibration."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..functional import at_least_float32


@MODELS.register_module()
class CalibratedNorm(nn.LayerNorm):
    """Normalise each channel by the mean and variance that a calibration found over images.

    The pooled features of two images differ by a few per cent. A LayerNorm leaves in what all
    images share, so the attentions hardly see the image. A BatchNorm takes it out, but it needs
    large batches. This norm takes it out by statistics over many images, and so works with one
    image as well.

    A forward pass only reads the statistics, in training as in evaluation: it gives the same when
    it is computed again (activation checkpointing), and what an image gives does not depend on the
    other images of its batch. :class:`~mmdet_odconv.ODConvCalibrationHook` moves the statistics
    between the iterations, and :func:`calibrate` does so in your own loop. Until then the mean is
    0 and the variance 1.

    Parameters and buffers have the names and shapes of ``nn.BatchNorm1d``. For PyTorch and
    MMEngine it is a LayerNorm, though: rules for norms such as ``norm_decay_mult`` apply to it,
    and conversions of BatchNorms (SyncBN, ``norm_eval``) leave it alone.

    Args:
        num_features (int): Channels.
        eps (float): Added to the variance. Default: 1e-5.
        momentum (float): Weight of a calibration in the statistics. The first ones have more, so
            that the statistics of n calibrations are their average as long as 1/n is greater.
            Default: 0.05.
        device, dtype: As in ``torch.nn.BatchNorm1d``.
    """

    _abbr_ = 'bn'
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.05,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, device=device, dtype=dtype)
        self.momentum = momentum
        self.register_buffer('running_mean', torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer('running_var', torch.ones(num_features, device=device, dtype=dtype))
        self.register_buffer(
            'num_batches_tracked', torch.zeros((), device=device, dtype=torch.long)
        )

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, and the statistics of a norm that was never calibrated."""
        super().reset_parameters()
        if 'running_mean' in self._buffers:  # not in the constructor of LayerNorm
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """From (B, C) to (B, C); B may be 1 or 0."""
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return torch.addcmul(self.bias - self.running_mean * scale, x, scale)

    def extra_repr(self) -> str:
        return f'{self.normalized_shape[0]}, eps={self.eps}, momentum={self.momentum}'


class Calibration:
    """Watches the inputs of a model's norms while it is open, then moves their statistics.

    Args:
        model (nn.Module): A model with :class:`CalibratedNorm` layers; without them, there is
            nothing to do.
    """

    def __init__(self, model: nn.Module) -> None:
        self.norms = [m for m in model.modules() if isinstance(m, CalibratedNorm)]
        self._sums: dict[CalibratedNorm, Tensor] = {}
        self._handles: list[Any] = []

    def open(self) -> None:
        """Begin to watch."""
        self._sums = {}
        self._handles = [norm.register_forward_pre_hook(self._watch) for norm in self.norms]

    def close(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def update(self) -> None:
        """Let what was seen, by all processes, into the statistics."""
        if not self.norms:
            return
        # Of each norm the count, Σd and Σd² of d = h - running_mean: no digits are lost.
        absent = [_wide(n.running_mean.new_zeros(2 * len(n.running_mean) + 1)) for n in self.norms]
        sums = torch.cat([self._sums.get(n, a) for n, a in zip(self.norms, absent, strict=True)])
        self._sums = {}
        all_reduce(sums)
        for norm, part in zip(self.norms, sums.split([len(a) for a in absent]), strict=True):
            count, shift, square = part.split([1, *norm.normalized_shape * 2])
            shift, square = shift / count.clamp(min=1), square / count.clamp(min=1)
            share = (1 / (norm.num_batches_tracked + 1)).clamp(min=norm.momentum) * (count > 0)
            # The variance of a mixture of the old statistics and the new.
            var = (1 - share) * (norm.running_var + share * shift**2) + share * (square - shift**2)
            norm.running_var.copy_(var)
            norm.running_mean.add_((share * shift).to(norm.running_mean))
            norm.num_batches_tracked.add_(count[0] > 0)

    def _watch(self, norm: CalibratedNorm, inputs: tuple[Tensor]) -> None:
        with torch.no_grad():
            d = _wide(inputs[0]) - norm.running_mean
            count = d.new_full((1,), len(d))
            sums = torch.cat([count, d.sum(0), d.square().sum(0)])
            self._sums[norm] = sums if norm not in self._sums else self._sums[norm] + sums


def _wide(x: Tensor) -> Tensor:
    return x.to(at_least_float32(x.dtype))


@contextmanager
def calibrate(model: nn.Module) -> Iterator[None]:
    """A context after which the model's norms know the images that it was given inside.

    Example::

        with calibrate(model), torch.no_grad():
            for images in batches:
                model(images)

    Args:
        model (nn.Module): A model with :class:`CalibratedNorm` in its attentions.
    """
    calibration = Calibration(model)
    calibration.open()
    try:
        yield
    finally:
        calibration.close()
    calibration.update()
