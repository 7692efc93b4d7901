"""CondConv and DyConv, the dynamic convolutions with a kernel attention alone, to compare with.

They share ODConv's bank, operator and attention module, so that a comparison tells about the
attentions and about nothing else.

Papers: CondConv: Conditionally Parameterized Convolutions for Efficient Inference
(https://arxiv.org/abs/1904.04971) and Dynamic Convolution: Attention over Convolution Kernels
(https://arxiv.org/abs/1912.03458)
"""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..functional import DEFAULT_SPREAD
from .odconv import _ODConvNd


@MODELS.register_module()
class CondConv2d(_ODConvNd):
    """y = conv(x, Σ_j k_j · W_j) + bias, with k = σ(W_fc · GAP(x) + b).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: As in ``torch.nn.Conv2d``.
        device, dtype: As in ``torch.nn.Conv2d``.
        kernel_num (int): K, kernels ("experts") in the bank. Default: 8.
        expert_bias (bool): Whether each kernel has a bias of its own, and the bias of a sample is
            Σ_j k_j · b_j, as in timm. Default: False.
        attention_init, spread, strategy: As in :class:`~mmdet_odconv.ODConv2d`.

    Raises:
        ValueError: As in ODConv2d.
    """

    ndim = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = 'zeros',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        kernel_num: int = 8,
        expert_bias: bool = False,
        attention_init: str = 'zero',
        spread: float = DEFAULT_SPREAD,
        strategy: str = 'auto',
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
            kernel_num,
            reduction=None,
            norm_cfg=None,
            attention_init=attention_init,
            attentions=('kernel',),
            kernel_activation='sigmoid',
            spread=spread,
            strategy=strategy,
        )
        self.attention.is_annealed = False
        if bias and expert_bias and kernel_num > 1:
            experts = torch.zeros(kernel_num, out_channels, device=device, dtype=dtype)
            self.bias = nn.Parameter(experts)

    def fold_norm(self, scale: Tensor, shift: Tensor) -> bool:
        # The shift of a norm is the same for all samples, and a mixture of biases is not.
        return not self.mixes_biases and super().fold_norm(scale, shift)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        bias = state_dict.get(f'{prefix}bias')
        if self.mixes_biases and bias is not None and bias.dim() == 1:
            total = self.attention.constant_product()
            state_dict[f'{prefix}bias'] = (bias / total).expand(self.kernel_num, -1)
        super()._load_from_state_dict(state_dict, prefix, *args)


@MODELS.register_module()
class DyConv2d(_ODConvNd):
    """y = conv(x, Σ_j k_j · W_j) + bias, with k = softmax((W_2 · ReLU(W_1 · GAP(x)) + b) / T).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: As in ``torch.nn.Conv2d``.
        device, dtype: As in ``torch.nn.Conv2d``.
        kernel_num (int): K, kernels in the bank. Default: 4.
        reduction (float): Width of the attention branch relative to ``in_channels``.
            Default: 1/4.
        temperature (float): T, positive; annealed from 30 in the paper. Default: 1.0.
        attention_init, spread, strategy: As in :class:`~mmdet_odconv.ODConv2d`.

    Raises:
        ValueError: As in ODConv2d.
    """

    ndim = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = 'zeros',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        kernel_num: int = 4,
        reduction: float = 1 / 4,
        temperature: float = 1.0,
        attention_init: str = 'zero',
        spread: float = DEFAULT_SPREAD,
        strategy: str = 'auto',
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
            kernel_num,
            reduction,
            min_attention_channels=1,
            temperature=temperature,
            norm_cfg=None,
            attention_init=attention_init,
            attentions=('kernel',),
            kernel_activation='softmax',
            spread=spread,
            strategy=strategy,
        )
