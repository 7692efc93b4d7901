"""The mixture of the kernel bank, Σ_j k_j · W_j, and the scales that the other attentions are.

Paper: Omni-Dimensional Dynamic Convolution, equation 3
(https://openreview.net/forum?id=DmpCfq6Mg39)

A kernel is seen as a matrix here: a row for each output channel, a column for each pair of an
input channel and a kernel position. The filter attention scales its rows; the channel and the
spatial attention scale its columns. Neither depends on the index of the kernel, so the mixture is
one matrix product, and they are applied to its result.
"""

import torch
from torch import Tensor

from .attention import Attentions
from .geometry import channels
from .precision import as_type
from .workspace import workspace


def column_scale(attentions: Attentions, groups: int) -> Tensor:
    """c ⊗ s, what scales the columns of the kernel matrix.

    Args:
        attentions (Attentions): c and s of B samples.
        groups (int): Of the convolution.

    Returns:
        Tensor: Shape (B, groups, C_in / groups · kernel positions).
    """
    channel, spatial = attentions.channel, attentions.spatial
    batch = channel.shape[0]
    if spatial is not None:
        channel = channel.unsqueeze(2) * spatial.unsqueeze(1)
    return channel.reshape(batch, groups, -1)


def column_scale_backward(grad: Tensor, attentions: Attentions) -> tuple[Tensor, Tensor | None]:
    """Gradients of c and s from that of :func:`column_scale`."""
    channel, spatial = attentions.channel, attentions.spatial
    grad = grad.reshape(*channel.shape, -1)
    if spatial is None:
        return as_type(grad[..., 0], channel.dtype), None
    return (
        as_type((grad * spatial[:, None, :]).sum(2), channel.dtype),
        as_type((grad * channel[:, :, None]).sum(1), spatial.dtype),
    )


def rows_within(block_bytes: int, bank: Tensor, batch: int) -> int:
    """How many rows of every sample's kernel matrix fit into ``block_bytes``; at least 1."""
    return max(1, block_bytes // (batch * bank.shape[2] * bank.element_size()))


def mix_rows(bank: Tensor, kernel: Tensor | None, rows: slice) -> Tensor:
    """Some rows of each sample's kernel matrix: Σ_j k_j · W_j.

    Args:
        bank (Tensor): W, shape (K, C_out, columns).
        kernel (Tensor, optional): k, shape (B, K); None for 1, only where K = 1.
        rows (slice): Output channels.

    Returns:
        Tensor: Shape (B, rows, columns), until the next call; without ``kernel`` the rows of the
        bank itself, shape (1, rows, columns).
    """
    part = channels(bank, rows)
    if kernel is None:
        return part
    flat = part.flatten(1)
    mixed = workspace('mixture', (len(kernel), flat.shape[1]), bank)
    kernel = as_type(kernel, bank.dtype)
    if (
        len(kernel) == 1
        and flat.shape[1] >= 1 << 19
        and flat.is_cpu
        and torch.get_num_threads() > 1
    ):
        # MKL leaves a product with a single row to one thread: 2.1 ms for 512→512 3×3, this 1.7.
        torch.mul(flat[0], kernel[0, 0], out=mixed[0])
        for row, weight in zip(flat[1:], kernel[0, 1:], strict=True):
            mixed[0].addcmul_(row, weight)
    else:
        torch.mm(kernel, flat, out=mixed)
    return mixed.view(-1, *part.shape[1:])


def mix_rows_backward(
    grad: Tensor,
    bank: Tensor,
    kernel: Tensor | None,
    rows: slice,
    grad_bank: Tensor | None,
    grad_kernel: Tensor | None,
) -> None:
    """Gradients of :func:`mix_rows`: into these rows of ``grad_bank``, added to ``grad_kernel``.

    Args:
        grad (Tensor): Of the mixture, shape (B, rows, columns).
        bank, kernel, rows: As in :func:`mix_rows`.
        grad_bank (Tensor, optional): The shape of ``bank``; these rows are written.
        grad_kernel (Tensor, optional): The shape of ``kernel``.
    """
    if kernel is None:
        if grad_bank is not None:
            torch.sum(grad, 0, out=grad_bank[0, rows])
        return
    flat = grad.flatten(1)
    if grad_bank is not None:
        torch.mm(as_type(kernel, bank.dtype).t(), flat, out=channels(grad_bank, rows).flatten(1))
    if grad_kernel is not None:
        grad_kernel += flat @ channels(bank, rows).flatten(1).t()
