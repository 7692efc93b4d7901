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
from .implementation import Geometry, Needed

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
    groups: int

    def of(self, attentions: Attentions) -> Attentions:
        """The attentions of these channels."""
        c, f, *others = attentions
        c = None if c is None else c[:, self.inputs]
        return Attentions(c, None if f is None else f[:, self.outputs], *others)

    def within(self, geometry: Geometry) -> Geometry:
        """The geometry of a convolution of these channels."""
        return geometry._replace(groups=self.groups)


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
            blocks.append(Block(outputs, slice(g * reads, end * reads), end - g))
    return tuple(blocks)


def rows_within(block_bytes: int, bank: Tensor, batch: int) -> int:
    """How many rows of every sample's kernel matrix fit into ``block_bytes``."""
    return block_bytes // (batch * bank.shape[2:].numel() * bank.element_size())


def mix(bank: Tensor, kernel: Tensor | None) -> Tensor:
    """The mixture of each sample, Σ_j k_j · W_j.

    Args:
        bank (Tensor): W, shape (K, ...), or some rows of it.
        kernel (Tensor, optional): k, shape (B, K), or None for 1, which needs K = 1.

    Returns:
        Tensor: Shape (B, entries of a kernel), valid until the next call. Without ``kernel`` it is
        the bank itself, shape (1, entries of a kernel), which must not be written.
    """
    flat = bank.flatten(1)
    if kernel is None:
        return flat
    if kernel.dtype != flat.dtype:
        kernel = kernel.to(flat.dtype)
    batch, entries = kernel.shape[0], flat.shape[1]
    if batch * entries < _LEAST_KEPT:
        return torch.mm(kernel, flat)
    mixed = workspace('mixture', (batch, entries), flat.dtype)
    if batch == 1 and entries >= 1 << 19 and torch.get_num_threads() > 1:
        # MKL leaves a product with a single row to one thread.
        torch.mul(flat[0], kernel[0, 0], out=mixed[0])
        for row, weight in zip(flat[1:], kernel[0, 1:], strict=True):
            mixed[0].addcmul_(row, weight)
        return mixed
    return torch.mm(kernel, flat, out=mixed)


def mix_backward(
    grad: Tensor, bank: Tensor, kernel: Tensor | None, needed: Needed, out: Tensor | None
) -> Tensor | None:
    """The gradients of :func:`mix`.

    Args:
        grad (Tensor): That of the mixtures, shape (B, entries of a kernel).
        bank (Tensor): As in :func:`mix`.
        kernel (Tensor, optional): As in :func:`mix`.
        needed (Needed): Which gradients are wanted.
        out (Tensor, optional): Where the gradient of the bank is written, if it is wanted.

    Returns:
        Tensor, optional: The gradient of ``kernel``, if it is wanted.
    """
    if out is not None and kernel is None:
        torch.sum(grad, 0, out=out.flatten())
    elif out is not None and kernel is not None:
        torch.mm(cast(kernel, grad.dtype).t(), grad, out=out.flatten(1))
    if not needed.kernel or kernel is None:
        return None
    return cast(grad @ bank.flatten(1).t(), kernel.dtype)
