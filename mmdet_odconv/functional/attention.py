"""The four attentions of ODConv, and the temperature that sharpens them in training.

Paper: Omni-Dimensional Dynamic Convolution, section 3.2 and appendix
(https://openreview.net/forum?id=DmpCfq6Mg39)
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Attentions(NamedTuple):
    """The attentions of each sample of a batch.

    ``None`` stands for an attention that is absent, that is, equal to 1 everywhere.

    Attributes:
        channel (Tensor): Input-channel attention c, shape (B, C_in). It is always there.
        filter (Tensor, optional): Output-filter attention f, shape (B, C_out). It is absent when
            the convolution is depthwise, because c already scales each filter there.
        spatial (Tensor, optional): Spatial attention s, shape (B, kernel positions), shared by
            all kernels of the bank.
        kernel (Tensor, optional): Kernel-number attention k, shape (B, K). It is absent when K = 1.
    """

    channel: Tensor
    filter: Tensor | None = None
    spatial: Tensor | None = None
    kernel: Tensor | None = None


def sigmoid_attention(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Channel, filter and spatial attention: sigmoid(logits / T).

    Args:
        logits (Tensor): Any shape. Types narrower than float32 are computed in float32.
        temperature (float | Tensor): T, positive, a number or a tensor of no dimensions. The
            larger T is, the closer the result is to 1/2. Default: 1.0.

    Returns:
        Tensor: The shape of ``logits``, float32 or wider.
    """
    return torch.sigmoid(_wide(logits) / temperature)


def softmax_attention(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Kernel-number attention: softmax(logits / T) over the K kernels.

    Args:
        logits (Tensor): Shape (B, K). Types narrower than float32 are computed in float32.
        temperature (float | Tensor): T, positive, a number or a tensor of no dimensions. The
            larger T is, the closer the result is to 1/K. Default: 1.0.

    Returns:
        Tensor: Shape (B, K), float32 or wider; each row sums to 1.
    """
    return torch.softmax(_wide(logits) / temperature, dim=1)


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
        raise ValueError(f"schedule must be 'linear' or 'inverse', got {schedule!r}")
    if iteration >= anneal_iters:
        return 1.0
    remaining = (anneal_iters - iteration) / anneal_iters
    if schedule == 'linear':
        return 1.0 + (initial - 1.0) * remaining
    return 1.0 / (1.0 + (1.0 / initial - 1.0) * remaining)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32 in place of the half-precision types, in which sums and exponents lose too much."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, without the cost of a call where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _wide(logits: Tensor) -> Tensor:
    return cast(logits, at_least_float32(logits.dtype))
