"""A kernel bank that computes what one static kernel computes."""

import torch
from torch import Tensor

# The kernels then have a cosine of 1/2 at most, and part further in training (docs/recipes.md).
DEFAULT_SPREAD = 1.0


def bank_from_static_weight(
    weight: Tensor,
    kernel_num: int,
    attention: float = 1.0,
    spread: float = DEFAULT_SPREAD,
    generator: torch.Generator | None = None,
) -> Tensor:
    """W_j = W / a + ε_j with Σ_j ε_j = 0: under constant attentions, the convolution with W.

    The kernel attention is uniform, 1/K, and the product of the three others is a, so that
    a · Σ_j W_j / K = W. Without ε_j all kernels would get equal gradients and stay equal.

    Args:
        weight (Tensor): W, shape (C_out, C_in / groups, *kernel_size), of a floating type; compute
            in float32 or wider for the sum of the ε_j to vanish.
        kernel_num (int): K.
        attention (float): a, positive. Default: 1.0.
        spread (float): Standard deviation of ε_j's entries, relative to the root mean square of
            W / a. Default: 1.0.
        generator (torch.Generator, optional): Source of the ε_j, of the CPU: they are the same
            on every device. Default: PyTorch's own.

    Returns:
        Tensor: Shape (K, C_out, C_in / groups, *kernel_size), the type and device of ``weight``.
    """
    kernel = weight / attention
    if kernel_num == 1:
        return kernel[None]
    shape = (kernel_num, *weight.shape)
    noise = torch.randn(shape, generator=generator, dtype=weight.dtype, device='cpu')
    noise = (noise - noise.mean(0)).to(weight.device)
    # The mean takes 1/K of the variance away.
    scale = spread * (kernel_num / (kernel_num - 1)) ** 0.5 * kernel.square().mean().sqrt()
    return kernel + scale * noise
