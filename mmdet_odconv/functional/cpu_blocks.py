"""Blocks of kernels that stay in a CPU's cache, in memory that is used again by the next call.

What the two savings are worth is measured in docs/performance.md.
"""

import math
import threading
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import Attentions, cast
from .implementation import Gradients, Needed, column_scale_backward

_of_thread = threading.local()
# Entries below which the allocator is as fast.
_LEAST_KEPT = 1 << 14


def workspace(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory that the next call with this name, on this thread, overwrites.

    A C library returns large buffers to the system and fetches fresh pages for the next ones,
    which costs more than filling them.

    Args:
        name (str): What the memory is for. Two that are in use at a time need two names.
        shape (tuple[int, ...]): Its shape.
        dtype (torch.dtype): Its type.
    """
    numel = math.prod(shape)
    if numel < _LEAST_KEPT:
        return torch.empty(shape, dtype=dtype, device='cpu')
    memory = getattr(_of_thread, name, {}).get(dtype)
    if memory is None or memory.numel() < numel:
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            memory = torch.empty(numel, dtype=dtype, device='cpu')
        # Under a dispatch mode (fake tensors, say) the memory may not be what it seems.
        if type(memory) is Tensor and torch._C._len_torch_dispatch_stack() == 0:
            _of_thread.__dict__.setdefault(name, {})[dtype] = memory
    return memory.narrow(0, 0, numel).view(shape)


def product_in_workspace(name: str, a: Tensor, b: Tensor) -> Tensor:
    """Products of matrices (B, n, m) and (B, m, p), in the workspace ``name``."""
    return torch.bmm(a, b, out=workspace(name, (a.shape[0], a.shape[1], b.shape[2]), a.dtype))


class Block(NamedTuple):
    """Some output channels of a convolution, the input channels that they read, their groups."""

    outputs: slice
    inputs: slice
    groups: slice


@lru_cache(maxsize=4096)
def output_blocks(
    in_channels: int, out_channels: int, groups: int, rows: int, within_group: bool = False
) -> tuple[Block, ...]:
    """All output channels in blocks of about ``rows``: whole groups, or parts of one group.

    Args:
        in_channels, out_channels, groups (int): Those of the convolution.
        rows (int): Output channels wanted in a block.
        within_group (bool): Whether a block must not have several groups. Default: False.
    """
    of_group, reads = out_channels // groups, in_channels // groups
    whole = 1 if within_group else max(1, rows // of_group)  # groups of a block
    step = max(1, min(rows, of_group)) if whole == 1 else whole * of_group
    blocks = []
    for g in range(0, groups, whole):
        end = min(g + whole, groups)
        first, last = g * of_group, end * of_group
        for o in range(first, last, step):
            outputs = slice(o, min(o + step, last))
            blocks.append(Block(outputs, slice(g * reads, end * reads), slice(g, end)))
    return tuple(blocks)


def slice_channels(tensor: Tensor, some: slice) -> Tensor:
    """``tensor[:, some]``, without the cost of a view where that is all of it."""
    return tensor if some.stop - some.start == tensor.shape[1] else tensor[:, some]


def rows_within(block_bytes: int, bank: Tensor, batch: int) -> int:
    """How many rows of every sample's kernel matrix fit into ``block_bytes``."""
    return block_bytes // (batch * math.prod(bank.shape[2:]) * bank.element_size())


def mix_rows(matrices: Tensor, kernel: Tensor | None, rows: slice) -> Tensor:
    """Some rows of each sample's kernel matrix, Σ_j k_j · W_j.

    Args:
        matrices (Tensor): The bank W as matrices, shape (K, C_out, columns).
        kernel (Tensor, optional): k, shape (B, K), or None for 1, which needs K = 1.
        rows (slice): The output channels.

    Returns:
        Tensor: Shape (B, rows, columns), valid until the next call. Without ``kernel`` it is the
        rows of the bank itself, shape (1, rows, columns), which must not be written.
    """
    part = slice_channels(matrices, rows)
    if kernel is None:
        return part
    flat, kernel = part.flatten(1), cast(kernel, matrices.dtype)
    mixed = workspace('mixture', (len(kernel), flat.shape[1]), matrices.dtype)
    if len(kernel) == 1 and flat.shape[1] >= 1 << 19 and torch.get_num_threads() > 1:
        # MKL leaves a product with a single row to one thread.
        torch.mul(flat[0], kernel[0, 0], out=mixed[0])
        for row, weight in zip(flat[1:], kernel[0, 1:], strict=True):
            mixed[0].addcmul_(row, weight)
    else:
        torch.mm(kernel, flat, out=mixed)
    return mixed.view(-1, *part.shape[1:])


class BlockGradients:
    """The gradients of the bank and of the attentions, gathered block by block.

    Args:
        matrices (Tensor): The bank as matrices, shape (K, C_out, columns).
        attentions (Attentions): Those of the B samples.
        scale (Tensor): c ⊗ s, shape (B, groups, columns).
        needed (Needed): Which gradients are wanted.

    Attributes:
        scale (Tensor, optional): The gradient of c ⊗ s.
        filter (Tensor, optional): The gradient of f.
    """

    def __init__(
        self, matrices: Tensor, attentions: Attentions, scale: Tensor, needed: Needed
    ) -> None:
        def zeros(like: Tensor | None) -> Tensor | None:
            return torch.zeros_like(like) if needed.attentions and like is not None else None

        self.matrices, self.attentions = matrices, attentions
        # Every row of the bank's gradient is written once. The others are sums over the blocks.
        self.bank = torch.empty_like(matrices) if needed.bank else None
        self.scale = zeros(scale)
        self.filter = zeros(attentions.filter)
        self.kernel = zeros(attentions.kernel)

    def add_mixture(self, grad: Tensor, rows: slice) -> None:
        """Add what the gradient of :func:`mix_rows`, shape (B, rows, columns), contributes."""
        kernel = self.attentions.kernel
        if kernel is None:
            if self.bank is not None:
                torch.sum(grad, 0, out=self.bank[0, rows])
            return
        flat = grad.flatten(1)
        if self.bank is not None:
            part = slice_channels(self.bank, rows).flatten(1)
            torch.mm(cast(kernel, flat.dtype).t(), flat, out=part)
        if self.kernel is not None:
            self.kernel += flat @ slice_channels(self.matrices, rows).flatten(1).t()

    def gradients(self, x: Tensor | None, bank: Tensor) -> Gradients:
        """All gradients, given that of x, if there is one, and the bank."""
        channel = spatial = None
        if self.scale is not None:
            channel, spatial = column_scale_backward(self.scale, self.attentions)
        grad_bank = None if self.bank is None else self.bank.view(bank.shape)
        return Gradients(x, grad_bank, channel, self.filter, spatial, self.kernel)
