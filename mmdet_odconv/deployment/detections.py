"""A detector from preprocessed images to boxes, in operations that ONNX has.

What mmdet's heads do after their last convolution (``predict_by_feat``) has shapes that depend on
the images. Here the same is computed in tensors whose sizes do not, in which a score of -1 says
that there is no box. So an exporter can follow it, for any number of images.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from mmcv.ops import RoIAlign
from mmdet.models.dense_heads import RPNHead, YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import Tensor, nn

from . import onnx_operators
from .dense_network import require_whole_averages
from .fuse import prepare_for_inference

# Detections of an image where the config sets no limit (YOLOX).
MOST = 1000

# What says how a part turns its outputs into boxes, and where a subclass may differ.
_DENSE = ('predict_by_feat', '_predict_by_feat_single', '_bbox_post_process')
_DECODING: dict[type, tuple[str, ...]] = {
    YOLOXHead: ('predict_by_feat', '_bbox_decode', '_bbox_post_process'),
    RPNHead: _DENSE,
    BaseDenseHead: _DENSE,
    CascadeRoIHead: ('predict', 'predict_bbox', 'predict_mask', '_bbox_forward', '_refine_roi'),
    StandardRoIHead: ('predict', 'predict_bbox', 'predict_mask', '_bbox_forward', '_mask_forward'),
    BBoxHead: ('predict_by_feat', '_predict_by_feat_single', 'regress_by_class'),
    FCNMaskHead: ('predict_by_feat', '_predict_by_feat_single'),
    SingleRoIExtractor: ('forward', 'map_roi_levels'),
}


class Candidates(NamedTuple):
    """What is left to non-maximum suppression: S places for each of B images.

    Attributes:
        boxes (Tensor): Corners x1, y1, x2, y2, shape (B, S, 4).
        scores (Tensor): Shape (B, S); -1 where there is no box.
        groups (Tensor): Shape (B, S). Boxes of two groups, classes or levels, do not compete.
    """

    boxes: Tensor
    scores: Tensor
    groups: Tensor


class Detections(nn.Module):
    """What a detector of mmdet predicts.

    Args:
        detector (nn.Module): A single-stage detector whose head decodes as mmdet's
            ``BaseDenseHead`` or ``YOLOXHead`` does, or Faster, Mask or Cascade R-CNN. Its norms
            are folded in a copy.

    Raises:
        ValueError: The detector is another one, or suppresses boxes otherwise than by plain NMS.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        require_detections(detector)
        self.detector = prepare_for_inference(copy.deepcopy(detector).eval())
        self.two_stages = isinstance(detector, TwoStageDetector)
        roi: Any = getattr(detector, 'roi_head', None)
        self.has_masks = self.two_stages and roi.with_mask

    @property
    def output_names(self) -> list[str]:
        """The names of what :meth:`forward` returns."""
        return ['boxes', 'scores', 'labels', *(['masks'] if self.has_masks else [])]

    @property
    def test_cfg(self) -> Any:
        """The config of the last step: thresholds and NMS."""
        model: Any = self.detector
        return model.roi_head.test_cfg if self.two_stages else model.bbox_head.test_cfg

    def forward(self, image: Tensor, size: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """The boxes of each image, M places for each, the highest score first.

        Args:
            image (Tensor): Preprocessed images, shape (B, 3, H, W).
            size (Tensor): Height and width of each image without its padding, shape (B, 2); boxes
                are clipped to it.
            scale (Tensor): Factors by which width and height were resized, shape (B, 2); boxes are
                divided by them.

        Returns:
            tuple[Tensor, ...]: Boxes as corners x1, y1, x2, y2, shape (B, M, 4), and their scores
            and labels, (B, M). Where an image has fewer boxes, the rest has score 0 and label -1.
            With a mask head also the probabilities of its cells in each box, (B, M, h, w).
        """
        model: Any = self.detector
        features = model.extract_feat(image)
        if not self.two_stages:
            head = model.bbox_head
            found = _dense_candidates(head, head(features), size, scale)
            return _finished(*_suppress(found, head.test_cfg))
        rpn, roi = model.rpn_head, model.roi_head
        unscaled = torch.ones_like(scale)
        found = _dense_candidates(rpn, rpn(features), size, unscaled)
        boxes, there, _ = _suppress(found, rpn.test_cfg)
        # mmdet scales the boxes before NMS, but where there are masks only at the end.
        found = _roi_candidates(roi, features, boxes, size, unscaled if self.has_masks else scale)
        of_none = (there <= 0).repeat_interleave(found.scores.shape[1] // there.shape[1], 1)
        found = found._replace(scores=torch.where(of_none, -1.0, found.scores))
        boxes, scores, labels = _suppress(found, roi.test_cfg)
        if not self.has_masks:
            return _finished(boxes, scores, labels)
        masks = _masks(roi, features, boxes, labels)
        return *_finished(boxes / scale.repeat(1, 2)[:, None], scores, labels), masks


def require_detections(detector: nn.Module) -> None:
    """Raise ValueError unless :class:`Detections` knows how ``detector`` finds its boxes."""
    name, model = type(detector).__name__, detector
    require_whole_averages(detector)
    roi: Any = getattr(model, 'roi_head', None)
    parts: list[Any]
    if isinstance(model, TwoStageDetector) and model.with_rpn and roi is not None:
        parts = [model.rpn_head, roi, *_listed(roi.bbox_head), *_listed(roi.bbox_roi_extractor)]
        if roi.with_mask:
            parts += [*_listed(roi.mask_head), *_listed(roi.mask_roi_extractor)]
    elif isinstance(model, SingleStageDetector) and hasattr(model, 'bbox_head'):
        parts = [model.bbox_head]
    else:
        raise ValueError(
            f'{name} is neither a single-stage detector with a dense head nor a Faster, Mask or '
            'Cascade R-CNN, so its boxes cannot be written to the file'
        )
    for part in parts:
        kind: Any = next((kind for kind in _DECODING if isinstance(part, kind)), object)
        own = [
            method
            for method in _DECODING.get(kind, ())
            if getattr(type(part), method) is not getattr(kind, method)
        ]
        if kind is object or own or getattr(part, 'custom_activation', False):
            raise ValueError(
                f'the {type(part).__name__} of {name} finds its boxes in a way of its own'
                f'{f" ({own[0]})" if own else ""}, which cannot be written to the file; --raw '
                'writes the outputs of a single-stage head'
            )
        for layer in getattr(part, 'roi_layers', ()):
            if not (isinstance(layer, RoIAlign) and layer.pool_mode == 'avg' and layer.aligned):
                raise ValueError(
                    f'{name} reads its regions by {layer}; ONNX has only RoIAlign with '
                    "aligned=True and pool_mode='avg'"
                )
        nms = (getattr(part, 'test_cfg', None) or {}).get('nms')
        if nms is not None and nms.get('type', 'nms') != 'nms':
            raise ValueError(f"{name} suppresses boxes by {nms['type']}; ONNX has only plain 'nms'")


def _listed(part: Any) -> list[Any]:
    """The stages of a Cascade R-CNN's part, or the one part of another detector."""
    return list(part) if isinstance(part, nn.ModuleList) else [part]


def _dense_candidates(head: Any, outputs: Sequence[Any], size: Tensor, scale: Tensor) -> Candidates:
    """The boxes of a dense head, at most ``nms_pre`` of each level."""
    cfg = head.test_cfg
    sizes = [level.shape[2:] for level in outputs[0]]
    options: dict[str, Any] = dict(dtype=outputs[0][0].dtype, device=outputs[0][0].device)
    if isinstance(head, YOLOXHead):
        priors = torch.cat(head.prior_generator.grid_priors(sizes, with_stride=True, **options))
        logits, deltas, objectness = (
            torch.cat([_rows(level, width) for level in maps], 1)
            for maps, width in zip(outputs, (head.cls_out_channels, 4, 1), strict=True)
        )
        boxes = head._bbox_decode(priors, deltas)
        scores, labels = logits.sigmoid().max(2)
        scores = scores * objectness.sigmoid().squeeze(2)
        return Candidates(
            boxes / scale.repeat(1, 2)[:, None],
            torch.where(scores >= cfg.score_thr, scores, -1.0),
            labels,
        )
    is_rpn = isinstance(head, RPNHead)
    threshold = -1.0 if is_rpn else cfg.get('score_thr', 0)
    found = []
    for level, (prior, logits, deltas, *factor) in enumerate(
        zip(head.prior_generator.grid_priors(sizes, **options), *outputs, strict=True)
    ):
        logits = _rows(logits, head.cls_out_channels)
        scores = logits.sigmoid() if head.use_sigmoid_cls else logits.softmax(2)[..., :-1]
        classes = head.cls_out_channels - (not head.use_sigmoid_cls)
        scores = torch.where(scores > threshold, scores, -1.0).flatten(1)
        scores, index = _highest(scores, cfg.get('nms_pre', -1))
        place, group = index // classes, index % classes
        if is_rpn:
            group = torch.full_like(group, level)
        for factors in factor:  # centerness
            factors = _rows(factors, 1).squeeze(2).sigmoid().gather(1, place)
            scores = torch.where(scores > 0, scores * factors, -1.0)
        deltas = _at(_rows(deltas, head.bbox_coder.encode_size), place)
        found.append((_decode(head.bbox_coder, prior[place], deltas, size), scores, group))
    boxes, scores, groups = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    boxes = boxes / scale.repeat(1, 2)[:, None]
    if cfg.get('min_bbox_size', -1) >= 0:
        large = (boxes[..., 2:] - boxes[..., :2] > cfg.min_bbox_size).all(2)
        scores = torch.where(large, scores, -1.0)
    return Candidates(boxes, scores, groups)


def _roi_candidates(
    roi: Any, features: Sequence[Tensor], boxes: Tensor, size: Tensor, scale: Tensor
) -> Candidates:
    """The boxes of the second stage, and of a cascade's further ones: one a proposal and class."""
    heads, extractors = _listed(roi.bbox_head), _listed(roi.bbox_roi_extractor)
    logits = []
    for head, extractor in zip(heads, extractors, strict=True):
        maps = _roi_features(extractor, features, boxes)
        score, deltas = head(roi.shared_head(maps) if roi.with_shared_head else maps)
        logits.append(score)
        if head is not heads[-1]:
            chosen = deltas
            if not head.reg_class_agnostic:
                label = score[:, :-1].argmax(1)
                chosen = _at(deltas.unflatten(1, (-1, 4)), label[:, None]).squeeze(1)
            boxes = _decode(head.bbox_coder, boxes, chosen.unflatten(0, boxes.shape[:2]), size)
    scores = (sum(logits[1:], logits[0]) / len(logits)).softmax(1)[:, :-1]
    classes = heads[-1].num_classes
    scores = torch.where(scores > roi.test_cfg.score_thr, scores, -1.0)
    # Each class has a box of its own, or all have the same.
    deltas = deltas.unflatten(1, (-1, 4)).expand(-1, classes, -1)
    deltas = deltas.reshape(boxes.shape[0], -1, 4)
    boxes = boxes[:, :, None].expand(-1, -1, classes, -1).flatten(1, 2)
    decoded = _decode(heads[-1].bbox_coder, boxes, deltas, size) / scale.repeat(1, 2)[:, None]
    groups = torch.arange(classes, device=scores.device).expand_as(scores)
    shape = decoded.shape[:2]
    return Candidates(decoded, scores.reshape(shape), groups.reshape(shape))


def _masks(roi: Any, features: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
    """The probabilities of each box's own class, shape (B, M, h, w), averaged over the stages."""
    stages = []
    for head, extractor in zip(
        _listed(roi.mask_head), _listed(roi.mask_roi_extractor), strict=True
    ):
        maps = _roi_features(extractor, features, boxes)
        logits = head(roi.shared_head(maps) if roi.with_shared_head else maps)
        which = torch.zeros_like(labels) if head.class_agnostic else labels.clamp(min=0)
        index = which.reshape(-1, 1, 1, 1).expand(-1, 1, *logits.shape[2:])
        stages.append(logits.gather(1, index).sigmoid())
    mean = sum(stages[1:], stages[0]) / len(stages)
    return mean.squeeze(1).unflatten(0, labels.shape)


def _roi_features(extractor: Any, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """What the extractor reads for each box, one after another, (B · P, C, h, w)."""
    layers = extractor.roi_layers
    images = torch.arange(boxes.shape[0], device=boxes.device)[:, None].expand(boxes.shape[:2])
    rois = boxes.flatten(0, 1)
    return onnx_operators.roi_features(
        list(features[: len(layers)]),
        rois,
        images.flatten(),
        onnx_operators.roi_levels(rois, len(layers), extractor.finest_scale),
        extractor.featmap_strides,
        *layers[0].output_size,
        layers[0].sampling_ratio,
    )


def _suppress(found: Candidates, cfg: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The boxes, scores and groups that are kept, ``max_per_img`` places for each image."""
    most, (boxes, scores, groups) = cfg.get('max_per_img', MOST), found
    boxes = torch.where((scores > 0)[..., None], boxes, 0.0)
    if not cfg.nms.get('class_agnostic', False):
        # As mmcv does it: far from each other, the groups do not overlap.
        apart = groups.to(boxes.dtype) * (boxes.amax((1, 2)) + 1)[:, None]
        boxes = boxes + apart[..., None]
    kept = onnx_operators.suppress(boxes, scores, cfg.nms.iou_threshold, most)
    # There may be fewer candidates than places.
    kept = torch.cat([kept, kept.new_full((kept.shape[0], most), -1.0)], 1)
    scores, index = kept.topk(most)
    index = torch.where(scores > 0, index, 0)
    return _at(found.boxes, index), scores, groups.gather(1, index)


def _finished(boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    there = scores > 0
    boxes = torch.where(there[..., None], boxes, 0.0)
    return boxes, torch.where(there, scores, 0.0), torch.where(there, labels, -1)


def _highest(scores: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The ``most`` highest scores of each image, all if there are fewer, and where they are."""
    if most <= 0:
        return scores, torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    return scores.topk(torch.sym_min(most, scores.shape[1]))


def _rows(maps: Tensor, width: int) -> Tensor:
    """From (B, priors · width, H, W) to (B, H · W · priors, width)."""
    return maps.permute(0, 2, 3, 1).reshape(maps.shape[0], -1, width)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """The rows of ``values`` (B, S, D) at ``index`` (B, k)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))


def _decode(coder: Any, priors: Tensor, deltas: Tensor, size: Tensor) -> Tensor:
    """The boxes (B, S, 4) of anchors, points or proposals, within their images."""
    boxes = coder.decode(priors.flatten(0, 1), deltas.flatten(0, 1))
    boxes = boxes.unflatten(0, priors.shape[:2])
    if not coder.clip_border:
        return boxes
    return boxes.clamp(min=0).minimum(size.flip(1).repeat(1, 2)[:, None])
