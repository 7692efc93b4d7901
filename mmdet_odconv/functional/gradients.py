"""What a strategy's backward pass is asked for, and what it returns."""

from typing import NamedTuple

import torch
from torch import Tensor

from .attention import Attentions


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd follows a function of ``tensors``."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class Needed(NamedTuple):
    """Which gradients are wanted: of x, of the bank, and of any attention."""

    x: bool
    bank: bool
    attentions: bool


class Gradients(NamedTuple):
    """Gradients of ``odconv``'s inputs; None for what is absent or not needed.

    Attributes:
        x (Tensor, optional): The shape of x.
        bank (Tensor, optional): The bank as matrices, shape (K, C_out, columns).
        columns (Tensor, optional): Of c ⊗ s, shape (B, groups, columns).
        filter (Tensor, optional): Shape (B, C_out).
        kernel (Tensor, optional): Shape (B, K).
    """

    x: Tensor | None
    bank: Tensor | None
    columns: Tensor | None
    filter: Tensor | None
    kernel: Tensor | None

    @classmethod
    def allocate(
        cls, needed: Needed, bank: Tensor, scale: Tensor, attentions: Attentions
    ) -> 'Gradients':
        """Memory for all but x: zeros, and for the bank, of which every row is written, anything.

        Args:
            needed (Needed): What is.
            bank (Tensor): Shape (K, C_out, columns).
            scale (Tensor): c ⊗ s, shape (B, groups, columns).
            attentions (Attentions): Of the B samples.
        """
        f, k = attentions.filter, attentions.kernel
        return cls(
            x=None,
            bank=torch.empty_like(bank) if needed.bank else None,
            columns=torch.zeros_like(scale) if needed.attentions else None,
            filter=torch.zeros_like(f) if needed.attentions and f is not None else None,
            kernel=torch.zeros_like(k) if needed.attentions and k is not None else None,
        )
