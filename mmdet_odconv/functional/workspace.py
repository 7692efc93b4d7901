"""Memory for what lives within one call, used again by the next.

A C library returns large buffers to the system and fetches fresh pages for the next ones, which
costs more than to fill them. (PyTorch's CUDA allocator keeps its memory; there a workspace is new.)
"""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_of_thread = threading.local()


def workspace(name: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """Uninitialised memory that the next call with this name, on this thread, overwrites.

    Args:
        name (str): What it is for; two that are in use at a time need two names.
        shape (Sequence[int]): Its shape.
        like (Tensor): Has its type and device.
    """
    if like.device.type != 'cpu':
        return like.new_empty(shape)
    numel = math.prod(shape)
    memories = _of_thread.__dict__.setdefault(name, {})
    memory = memories.get(like.dtype)
    if memory is None or memory.numel() < numel:
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            memory = torch.empty(numel, dtype=like.dtype)
        memories[like.dtype] = memory
    return memory[:numel].view(shape)
