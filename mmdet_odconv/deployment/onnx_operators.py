"""Two operators of detectors that ONNX has and PyTorch does not: NMS and RoIAlign over levels.

``torch.export`` sees each of them as one call whose outputs have known shapes, and
:data:`TRANSLATIONS` says what the ONNX exporter makes of it. In PyTorch they are mmcv's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmcv.ops import nms as mmcv_nms
from mmcv.ops import roi_align
from torch import Tensor

from ..compat import ONNX_EXPORT

# What the exporter makes of the operators; empty where it cannot export.
TRANSLATIONS: dict[Any, Callable[..., Any]] = {}


def roi_levels(rois: Tensor, levels: int, finest_scale: float) -> Tensor:
    """The level of the feature pyramid that each box (R, 4) is read from, as mmdet maps them."""
    scale = ((rois[:, 2] - rois[:, 0]) * (rois[:, 3] - rois[:, 1])).sqrt()
    return (scale / finest_scale + 1e-6).log2().floor().clamp(0, levels - 1).long()


if ONNX_EXPORT:

    @torch.library.custom_op('mmdet_odconv::suppress', mutates_args=())
    def suppress(boxes: Tensor, scores: Tensor, iou_threshold: float, most: int) -> Tensor:
        """Greedy non-maximum suppression of each image.

        Args:
            boxes (Tensor): Corners x1, y1, x2, y2, shape (B, S, 4).
            scores (Tensor): Shape (B, S); boxes with a score of 0 or less are none.
            iou_threshold (float): Overlap from which on the box with the lower score goes.
            most (int): How many boxes to keep of an image.

        Returns:
            Tensor: The scores of the boxes that are kept, and -1 for the others, shape (B, S).
        """
        kept = torch.full_like(scores, -1)
        for i in range(len(boxes)):
            valid = (scores[i] > 0).nonzero()[:, 0]
            if len(valid):
                _, index = mmcv_nms(boxes[i, valid], scores[i, valid], iou_threshold)
                valid = valid[index[:most]]
            kept[i, valid] = scores[i, valid]
        return kept

    @suppress.register_fake
    def _(boxes: Tensor, scores: Tensor, iou_threshold: float, most: int) -> Tensor:
        return torch.empty_like(scores)

    @torch.library.custom_op('mmdet_odconv::roi_features', mutates_args=())
    def roi_features(
        maps: Sequence[Tensor],
        rois: Tensor,
        images: Tensor,
        levels: Tensor,
        strides: Sequence[int],
        height: int,
        width: int,
        sampling_ratio: int,
    ) -> Tensor:
        """RoIAlign of boxes, each on its level of a feature pyramid.

        Args:
            maps (Sequence[Tensor]): Levels of the pyramid, (B, C, H_l, W_l) each.
            rois (Tensor): Boxes in the pixels of the images, shape (R, 4).
            images (Tensor): Which image of the batch each box lies in, shape (R,).
            levels (Tensor): Which level each box is read from, shape (R,).
            strides (Sequence[int]): Strides of the levels.
            height, width (int): Size of the result.
            sampling_ratio (int): As in mmcv's ``RoIAlign``.

        Returns:
            Tensor: Shape (R, C, height, width).
        """
        out = maps[0].new_zeros(len(rois), maps[0].shape[1], height, width)
        boxes = torch.cat([images[:, None].to(rois.dtype), rois], 1)
        for level, (x, stride) in enumerate(zip(maps, strides, strict=True)):
            here = (levels == level).nonzero()[:, 0]
            if len(here):
                out[here] = roi_align(
                    x, boxes[here], (height, width), 1 / stride, sampling_ratio, 'avg', True
                )
        return out

    @roi_features.register_fake
    def _(maps: Sequence[Tensor], rois: Tensor, *args: Any) -> Tensor:
        *_, height, width, _ = args
        return maps[0].new_empty(rois.shape[0], maps[0].shape[1], height, width)

    def _onnx_suppress(boxes: Any, scores: Any, iou_threshold: float, most: int) -> Any:
        from onnxscript import opset18 as op

        chosen = op.NonMaxSuppression(
            boxes,
            op.Unsqueeze(scores, op.Constant(value_ints=[1])),
            op.Constant(value_ints=[most]),
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[0.0]),
        )
        # Of (image, class, box) there is one class.
        places = op.Gather(chosen, op.Constant(value_ints=[0, 2]), axis=1)
        none = op.Expand(op.Constant(value_floats=[-1.0]), op.Shape(scores))
        return op.ScatterND(none, places, op.GatherND(scores, places))

    def _onnx_roi_features(
        maps: Sequence[Any],
        rois: Any,
        images: Any,
        levels: Any,
        strides: Sequence[int],
        height: int,
        width: int,
        sampling_ratio: int,
    ) -> Any:
        from onnxscript import opset18 as op

        places, parts = [], []
        for level, (x, stride) in enumerate(zip(maps, strides, strict=True)):
            here = op.NonZero(op.Equal(levels, op.Constant(value_int=level)))
            here = op.Squeeze(here, op.Constant(value_ints=[0]))
            part = op.RoiAlign(
                x,
                op.Gather(rois, here),
                op.Gather(images, here),
                coordinate_transformation_mode='half_pixel',
                mode='avg',
                output_height=height,
                output_width=width,
                sampling_ratio=sampling_ratio,
                spatial_scale=1 / stride,
            )
            places.append(here)
            parts.append(part)
        # Back from the order of the levels to that of the boxes.
        order = op.Concat(*places, axis=0)
        numbers = op.Range(
            op.Constant(value_int=0),
            op.Squeeze(op.Shape(order), op.Constant(value_ints=[0])),
            op.Constant(value_int=1),
        )
        back = op.ScatterElements(order, order, numbers, axis=0)
        return op.Gather(op.Concat(*parts, axis=0), back)

    TRANSLATIONS[torch.ops.mmdet_odconv.suppress.default] = _onnx_suppress
    TRANSLATIONS[torch.ops.mmdet_odconv.roi_features.default] = _onnx_roi_features
