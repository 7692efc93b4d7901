"""Memory for what lives within one call, used again by the next.

A C library returns large buffers to the system and fetches fresh pages for the next ones, which
costs more than to fill them. (PyTorch's CUDA allocator keeps its memory; there a workspace is new.)
"""

import math
import threading

import torch
from torch import Tensor

_of_thread = threading.local()


def workspace(name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uninitialised memory that the next call with this name, on this thread, overwrites.

    Args:
        name (str): What it is for; two that are in use at a time need two names.
        shape (tuple[int, ...]): Its shape.
        like (Tensor): Has its type and device.
    """
    if like.is_cpu:
        kept = _of_thread.__dict__.setdefault(name, {})
        view = kept.get((like.dtype, shape))
        return _kept_view(kept, shape, like.dtype) if view is None else view
    return like.new_empty(shape)


def product_in_workspace(name: str, a: Tensor, b: Tensor) -> Tensor:
    """Products of matrices (B, n, m) and (B, m, p), in the workspace ``name``."""
    out = workspace(name, (a.shape[0], a.shape[1], b.shape[2]), a)
    return torch.bmm(a, b, out=out)


def _kept_view(kept: dict[object, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A view of ``kept``'s memory, which grows if need be; kept there itself for the next call."""
    numel = math.prod(shape)
    memory = kept.get(dtype)
    if memory is None or memory.numel() < numel or len(kept) > 1000:
        kept.clear()  # The views keep the memory alive.
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            memory = kept[dtype] = torch.empty(numel, dtype=dtype)
    with torch.inference_mode(False):
        kept[dtype, shape] = memory[:numel].view(shape)
    return kept[dtype, shape]
