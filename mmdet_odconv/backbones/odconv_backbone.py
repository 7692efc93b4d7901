"""What the backbones share."""

from typing import Any

from torch import nn

from ..layers import ODConv2d


class ODConvBackbone:
    """A backbone of mmdet that takes the arguments of its ODConv layers, to be mixed in before it.

    Args:
        *args, **kwargs: Those of mmdet's backbone.
        kernel_num (int): K, kernels in each bank. Default: 4.
        reduction (float): Width of the attention branches relative to their input. Default: 1/16.
        temperature (float): T of the attentions. Default: 1.0.
        odconv_cfg (dict, optional): Further arguments of every
            :class:`~mmdet_odconv.ODConv2d`, for example ``dict(norm_cfg=dict(type='LN'))``.
    """

    def __init__(
        self,
        *args: Any,
        kernel_num: int = 4,
        reduction: float = 1 / 16,
        temperature: float = 1.0,
        odconv_cfg: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # Before the constructor of mmdet's backbone, which may build its stages with odconv_like.
        self._odconv_args = {
            'kernel_num': kernel_num,
            'reduction': reduction,
            'temperature': temperature,
            **(odconv_cfg or {}),
        }
        super().__init__(*args, **kwargs)

    def odconv_like(self, conv: Any) -> nn.Module:
        """An ODConv layer of the backbone's arguments with the geometry of the plain ``conv``."""
        return ODConv2d.like(conv, **self._odconv_args)
