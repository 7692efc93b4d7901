"""CondConv and DyConv, the dynamic convolutions with a kernel attention alone, to compare with.

They share ODConv's bank, operator and attention module, so that a comparison tells about the
attentions and about nothing else.

Papers: CondConv: Conditionally Parameterized Convolutions for Efficient Inference
(https://arxiv.org/abs/1904.04971) and Dynamic Convolution: Attention over Convolution Kernels
(https://arxiv.org/abs/1912.03458)
"""

from typing import Any, ClassVar

from mmengine.registry import MODELS

from ..functional.arguments import ArgumentError
from .odconv import _ODConvNd


class _KernelAttentionConv2d(_ODConvNd):
    """A layer with the kernel attention alone, and ``fixed`` values for other arguments."""

    ndim = 2
    fixed: ClassVar[dict[str, Any]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name, value in self.fixed.items():
            given = kwargs.setdefault(name, value)
            if given != value:
                raise ArgumentError(
                    f'{name} of a {type(self).__name__} is always {value!r}, got {given!r}'
                )
        super().__init__(*args, **kwargs)


@MODELS.register_module()
class CondConv2d(_KernelAttentionConv2d):
    """y = conv(x, Σ_j k_j · W_j) + bias, with k = σ(W_fc · GAP(x) + b).

    Args:
        *args, **kwargs: The arguments of :class:`~mmdet_odconv.ODConv2d`, without ``attentions``,
            ``kernel_activation``, ``reduction`` and ``norm_cfg``, which a CondConv has fixed
            values for.
        kernel_num (int): K, kernels ("experts") in the bank. Default: 8.

    Raises:
        ValueError: As in ODConv2d, or an argument with a fixed value has another.
    """

    fixed = dict(reduction=None, norm_cfg=None, attentions=('kernel',), kernel_activation='sigmoid')

    def __init__(self, *args: Any, kernel_num: int = 8, **kwargs: Any) -> None:
        super().__init__(*args, kernel_num=kernel_num, **kwargs)


@MODELS.register_module()
class DyConv2d(_KernelAttentionConv2d):
    """y = conv(x, Σ_j k_j · W_j) + bias, with k = softmax((W_2 · ReLU(W_1 · GAP(x)) + b) / T).

    Args:
        *args, **kwargs: The arguments of :class:`~mmdet_odconv.ODConv2d`, without ``attentions``,
            ``kernel_activation``, ``min_attention_channels`` and ``norm_cfg``, which a DyConv has
            fixed values for.
        kernel_num (int): K, kernels in the bank. Default: 4.
        reduction (float): Width of the attention branch relative to ``in_channels``.
            Default: 1/4.

    Raises:
        ValueError: As in ODConv2d, or an argument with a fixed value has another.
    """

    fixed = dict(
        min_attention_channels=1,
        norm_cfg=None,
        attentions=('kernel',),
        kernel_activation='softmax',
    )

    def __init__(
        self, *args: Any, kernel_num: int = 4, reduction: float = 1 / 4, **kwargs: Any
    ) -> None:
        super().__init__(*args, kernel_num=kernel_num, reduction=reduction, **kwargs)
