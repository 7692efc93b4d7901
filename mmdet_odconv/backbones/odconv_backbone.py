"""What the backbones share."""

from typing import Any

from mmengine.registry import MODELS
from torch import nn

from .._checks import ArgumentError
from ..layers import DynamicConvNd


class ODConvBackbone:
    """Adds the arguments of ODConv layers to a backbone of mmdet.

    Stages that are frozen (``frozen_stages``) stay plain: they would cost as much as dynamic
    convolutions, but could not learn anything. With ``train_frozen_attentions``, their kernels are
    frozen and their attentions learn.

    Args:
        *args, **kwargs: The arguments of mmdet's backbone.
        kernel_num (int, optional): K, kernels in each bank. Default: that of the layer, which is 4
            for ODConv.
        reduction (float, optional): Width of the attention branches relative to their input, None
            for branches without a squeeze. Default: that of the layer, which is 1/16 for ODConv.
        temperature (float, optional): T of the attentions. Default: that of the layer, 1.0.
        odconv_cfg (dict, optional): Further arguments of every layer, for example
            ``dict(norm_cfg=dict(type='LN'))``. A ``type`` in it replaces
            :class:`~mmdet_odconv.ODConv2d`, for example ``dict(type='FDConv2d')``.
            Default: None.
        train_frozen_attentions (bool): Whether frozen stages become dynamic, too, with attentions
            that train. Default: False.

    Raises:
        ValueError: An argument of the layers is out of its range, or the ``type`` is not that of a
            2-D dynamic convolution. The message names it and its value.
    """

    def __init__(
        self,
        *args: Any,
        kernel_num: int | None = None,
        temperature: float | None = None,
        odconv_cfg: dict[str, Any] | None = None,
        train_frozen_attentions: bool = False,
        **kwargs: Any,
    ) -> None:
        # Before the constructor of mmdet's backbone, which may build its stages with odconv_like.
        given: dict[str, Any] = dict(kernel_num=kernel_num, temperature=temperature)
        self._odconv_args = {name: value for name, value in given.items() if value is not None}
        self._odconv_args |= odconv_cfg or {}
        if 'reduction' in kwargs:
            self._odconv_args['reduction'] = kwargs.pop('reduction')
        kind = self._odconv_args.pop('type', 'ODConv2d')
        layer = MODELS.get(kind) if isinstance(kind, str) else kind
        dynamic = isinstance(layer, type) and issubclass(layer, DynamicConvNd)
        if not (dynamic and layer.ndim == 2):
            raise ArgumentError(
                "odconv_cfg.type must be a 2-D dynamic convolution, such as 'ODConv2d', "
                f'got {kind!r}'
            )
        self._layer = layer
        self.train_frozen_attentions = train_frozen_attentions
        super().__init__(*args, **kwargs)

    def _freeze_stages(self) -> None:
        super()._freeze_stages()  # type: ignore[misc]
        if self.train_frozen_attentions:
            backbone: Any = self
            for layer in backbone.modules():
                if isinstance(layer, self._layer):
                    for parameter in layer.attention_parameters().values():
                        parameter.requires_grad = True

    @property
    def stages_kept_plain(self) -> int:
        """The number of the first stages that stay plain."""
        backbone: Any = self
        return 0 if self.train_frozen_attentions else max(backbone.frozen_stages, 0)

    def odconv_like(self, conv: Any) -> nn.Module:
        """An ODConv layer of the backbone's arguments with the geometry of the plain ``conv``."""
        return self._layer.like(conv, **self._odconv_args)
