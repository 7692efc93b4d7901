"""CondConv and DyConv, the dynamic convolutions with a kernel attention alone, to compare with.

They share ODConv's bank, operator and attention module, so that a comparison tells about the
attentions and about nothing else.

Papers: CondConv: Conditionally Parameterized Convolutions for Efficient Inference
(https://arxiv.org/abs/1904.04971) and Dynamic Convolution: Attention over Convolution Kernels
(https://arxiv.org/abs/1912.03458)
"""

from typing import Any

from mmengine.registry import MODELS

from .odconv import _ODConvNd


@MODELS.register_module()
class CondConv2d(_ODConvNd):
    """y = conv(x, Σ_j k_j · W_j) + bias, with k = σ(W_fc · GAP(x) + b).

    Args:
        *args, **kwargs: The arguments of :class:`~mmdet_odconv.ODConv2d`, without ``attentions``,
            ``kernel_activation``, ``reduction``, ``min_attention_channels`` and ``norm_cfg``,
            which a CondConv has fixed values for.
        kernel_num (int): K, kernels ("experts") in the bank. Default: 8.
    """

    ndim = 2

    def __init__(self, *args: Any, kernel_num: int = 8, **kwargs: Any) -> None:
        super().__init__(  # type: ignore[misc]  # mypy takes `args` for all of the arguments
            *args,
            kernel_num=kernel_num,
            reduction=None,
            norm_cfg=None,
            attentions=('kernel',),
            kernel_activation='sigmoid',
            **kwargs,
        )


@MODELS.register_module()
class DyConv2d(_ODConvNd):
    """y = conv(x, Σ_j k_j · W_j) + bias, with k = softmax((W_2 · ReLU(W_1 · GAP(x)) + b) / T).

    Args:
        *args, **kwargs: The arguments of :class:`~mmdet_odconv.ODConv2d`, without ``attentions``,
            ``kernel_activation``, ``min_attention_channels`` and ``norm_cfg``, which a DyConv has
            fixed values for.
        kernel_num (int): K, kernels in the bank. Default: 4.
        reduction (float): Width of the attention branch relative to ``in_channels``.
            Default: 1/4.
    """

    ndim = 2

    def __init__(
        self, *args: Any, kernel_num: int = 4, reduction: float = 1 / 4, **kwargs: Any
    ) -> None:
        super().__init__(  # type: ignore[misc]  # as above
            *args,
            kernel_num=kernel_num,
            reduction=reduction,
            min_attention_channels=1,
            norm_cfg=None,
            attentions=('kernel',),
            **kwargs,
        )
