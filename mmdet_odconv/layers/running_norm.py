"""Batch normalisation for an attention that is trained with a few images at a time."""

import torch
from mmengine.registry import MODELS
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase


@MODELS.register_module()
class RunningNorm(_NormBase):
    """Normalise by running statistics, in training as well as in evaluation.

    A BatchNorm in training takes the mean and the variance of its batch, which say nothing if the
    batch is two images. This layer takes those of the batches before, as averages that forget, and
    then lets its batch into them. So what an image gives does not depend on the other images of
    its batch, and one image is enough. The statistics are constants in the backward pass.

    The parameters and buffers have the names and shapes of ``nn.BatchNorm1d``. It is none,
    however, so that ``norm_eval=True``, which holds the statistics of a pretrained backbone, lets
    those of a new attention follow the training. Each process of a distributed run has its own
    statistics, as with BatchNorm; MMEngine's ``SyncBuffersHook`` averages them.

    A forward pass without gradients leaves the statistics as they are. MMDetection's activation
    checkpointing (``with_cp=True``) runs a layer once without gradients and once with them, so both
    passes give the same.

    Args:
        num_features (int): Channels.
        eps (float): Added to the variance. Default: 1e-5.
        momentum (float): Weight of a batch in the statistics. The first batches have more, so that
            the statistics of n batches are their average as long as 1/n is greater. Default: 0.05.
        device, dtype: As in ``torch.nn.BatchNorm1d``.
    """

    _abbr_ = 'bn'
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.05,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """From (B, C) or (B, C, 1, ...) to the same shape; B may be 1 or 0."""
        h = x.flatten(1)
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        out = (h - self.running_mean) * scale + self.bias
        if self.training and torch.is_grad_enabled() and h.shape[0]:
            self._update(h.detach())
        return out.view_as(x)

    def _update(self, h: Tensor) -> None:
        # New tensors: compiled code may compute parts of the forward pass again in the backward
        # pass, from statistics that must not have changed since.
        n = self.num_batches_tracked + 1
        mean = self.running_mean.lerp(h.mean(0), self._share(1 / n))
        # The first variance, 1, counts as a batch: that of a single sample is 0.
        deviation = (h - mean).square().mean(0)
        self.running_var = self.running_var.lerp(deviation, self._share(1 / (n + 1)))
        self.running_mean, self.num_batches_tracked = mean, n

    def _share(self, share: Tensor) -> Tensor:
        return share.clamp(min=self.momentum).to(self.running_mean)
