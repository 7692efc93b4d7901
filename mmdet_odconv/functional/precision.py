"""Types of tensors, and automatic mixed precision where a function minds the types itself."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def as_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, without the cost of a call where it has that type."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context without autocast; it costs nothing where there is none."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
