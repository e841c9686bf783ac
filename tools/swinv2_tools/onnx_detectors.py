"""RetinaNet, Faster and Mask R-CNN of mmdet as graphs of standard operators, with the layers of mmdet.

What mmdet computes for as many boxes as it finds is computed here for as many as there may be, and a score of -1 marks
those that are none. So no shape depends on what is in an image. Two operators of mmcv become operators of ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmcv.ops import nms, roi_align
from mmdet.models import FasterRCNN, MaskRCNN, RetinaNet
from mmdet.models.dense_heads import RetinaHead, RPNHead
from mmdet.models.roi_heads import (
    ConvFCBBoxHead,
    FCNMaskHead,
    Shared2FCBBoxHead,
    Shared4Conv1FCBBoxHead,
    SingleRoIExtractor,
    StandardRoIHead,
)
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder
from torch import Tensor, nn

from .onnx_models import Exported

LIBRARY = 'swinv2_mm_export'  # of the operators below
NONE = -1  # score and label of a box that is none
UNMATCHED = 0.02  # of an image's boxes at most: between two that are as good, rounding decides which one is kept


@torch.library.custom_op(f'{LIBRARY}::best_boxes', mutates_args=())
def best_boxes(boxes: Tensor, scores: Tensor, iou_thr: float, score_thr: float, limit: int) -> Tensor:
    """Non-maximum suppression.

    Args:
        boxes (Tensor): (B, N, 4), corners.
        scores (Tensor): (B, N).
        iou_thr (float): a box is suppressed if it overlaps a better one by more.
        score_thr (float): boxes with more than this take part.
        limit (int): boxes that are kept at most, in each image.

    Returns:
        Tensor: (B, limit) int64, the indices of the boxes that are kept, by falling score; then `NONE`.
    """
    kept = torch.full((len(boxes), limit), NONE)
    for image, of_boxes, of_scores in zip(kept, boxes, scores):
        (among,) = (of_scores > score_thr).nonzero(as_tuple=True)
        best = among[nms(of_boxes[among], of_scores[among], iou_thr)[1][:limit]]
        image[: len(best)] = best
    return kept


@best_boxes.register_fake
def _(boxes, scores, iou_thr, score_thr, limit):
    return boxes.new_empty(boxes.shape[0], limit, dtype=torch.int64)


@torch.library.custom_op(f'{LIBRARY}::pool_boxes', mutates_args=())
def pool_boxes(maps: Tensor, rois: Tensor, size: int, scale: float, sampling_ratio: int, aligned: bool) -> Tensor:
    """RoIAlign.

    Args:
        maps (Tensor): (B, C, h, w).
        rois (Tensor): (K, 5), image and corners in pixels.
        size (int): height and width of what is pooled.
        scale (float): of the map, against pixels.
        sampling_ratio (int): samples along each side of a bin; 0: as many as it has pixels.
        aligned (bool): whether pixels have their centres at a half.

    Returns:
        Tensor: (K, C, size, size).
    """
    return roi_align(maps, rois, size, scale, sampling_ratio, 'avg', aligned)


@pool_boxes.register_fake
def _(maps, rois, size, scale, sampling_ratio, aligned):
    return maps.new_empty(rois.shape[0], maps.shape[1], size, size)


def translations() -> dict:
    """How the exporter writes the two operators, in operators of ONNX."""
    from onnxscript import opset18 as op  # the exporter sets the version that it is asked for

    def best(boxes, scores, iou_thr, score_thr, limit):
        chosen = op.NonMaxSuppression(  # (M, 3): image, class and box, sorted by image and score
            boxes,
            op.Unsqueeze(scores, op.Constant(value_ints=[1])),
            op.Constant(value_ints=[limit]),
            op.Constant(value_floats=[iou_thr]),
            op.Constant(value_floats=[score_thr]),
        )
        image, box = (op.Gather(chosen, op.Constant(value_int=column), axis=1) for column in (0, 2))
        batch = op.Shape(boxes, start=0, end=1)
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        images = op.Unsqueeze(op.Range(zero, op.Squeeze(batch), one), op.Constant(value_ints=[1]))  # (B, 1)
        is_before = op.Cast(op.Less(op.Unsqueeze(image, op.Constant(value_ints=[0])), images), to=7)
        firsts = op.ReduceSum(is_before, op.Constant(value_ints=[1]), keepdims=0)  # (B,), where an image's boxes begin
        rank = op.Sub(op.Range(zero, op.Squeeze(op.Shape(image)), one), op.Gather(firsts, image))
        none = op.Expand(op.Constant(value_int=NONE), op.Concat(batch, op.Constant(value_ints=[limit]), axis=0))
        places = op.Concat(*(op.Unsqueeze(x, op.Constant(value_ints=[1])) for x in (image, rank)), axis=1)
        return op.ScatterND(none, places, box)

    def pool(maps, rois, size, scale, sampling_ratio, aligned):
        image = op.Cast(op.Gather(rois, op.Constant(value_int=0), axis=1), to=7)
        corners = op.Gather(rois, op.Constant(value_ints=[1, 2, 3, 4]), axis=1)
        return op.RoiAlign(
            maps,
            corners,
            image,
            output_height=size,
            output_width=size,
            spatial_scale=scale,
            sampling_ratio=sampling_ratio,
            coordinate_transformation_mode='half_pixel' if aligned else 'output_half_pixel',
        )

    operators = torch.ops.swinv2_mm_export
    return {operators.best_boxes.default: best, operators.pool_boxes.default: pool}


class Detector(Exported):
    """A detector from image to boxes, and masks if it has any.

    Raises:
        ValueError: it is of another kind; the message names the part.
    """

    def __init__(self, model: nn.Module, preprocess: bool):
        super().__init__(model, preprocess)
        check_kind(model)

    def __str__(self):
        return f'the detector {type(self.model).__name__}'

    def names(self, count: int) -> list[str]:
        return ['boxes', 'scores', 'labels', 'masks'][:count]

    def compute(self, image: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
        """Detect in images (B, 3, H, W).

        Returns:
            tuple[Tensor]: boxes (B, N, 4), corners in pixels, scores (B, N) and labels (B, N) by falling score, `NONE`
            where fewer than N are found; if the model has masks, (B, N, h, w), their probabilities inside the box.
        """
        maps = self.model.extract_feat(image)
        if isinstance(self.model, RetinaNet):
            head = self.model.bbox_head
            return first_stage(head, maps, head.test_cfg.get('score_thr', 0), height, width)
        proposals, scores, _ = first_stage(self.model.rpn_head, maps, 0, height, width)
        return second_stage(self.model.roi_head, maps, proposals, scores, height, width)

    def translations(self) -> dict:
        return translations()

    def on_trial(self, onnx_model):
        """The same with a score threshold of 0, because noise has no objects."""
        import onnx

        trial = onnx.ModelProto()
        trial.CopyFrom(onnx_model)
        trial.graph.initializer.append(onnx.helper.make_tensor('no_threshold', onnx.TensorProto.FLOAT, [1], [0]))
        for node in trial.graph.node:
            if node.op_type == 'NonMaxSuppression':
                node.input[4] = 'no_threshold'
        return trial

    def expected(self, image: Tensor) -> tuple[Tensor, ...]:
        """The outputs with a score threshold of 0."""
        config = (self.model.bbox_head if isinstance(self.model, RetinaNet) else self.model.roi_head).test_cfg
        threshold = config.get('score_thr', 0)
        config.score_thr = 0
        try:
            return self(image)
        finally:
            config.score_thr = threshold

    def difference(self, outs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        """Between boxes and those of the same label that are most alike, which are all but a few (`UNMATCHED`)."""
        if any(out.shape != value.shape for out, value in zip(outs, expected)):
            return math.inf
        worst = 0.0
        for image in range(len(outs[0])):
            ones, others = ([part[image] for part in parts] for parts in (outs, expected))
            for distances in (nearest(ones, others), nearest(others, ones)):
                counted = distances.sort().values[: math.ceil((1 - UNMATCHED) * len(distances))]
                worst = max([worst, *counted.tolist()])
        return worst


def nearest(ones: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """How far each box of an image is from the most similar other one of its label.

    Args:
        ones (Sequence[Tensor]), others (Sequence[Tensor]): boxes (N, 4), scores (N,), labels (N,), perhaps masks.

    Returns:
        Tensor: for each of ``ones`` the larger difference of score, of mask, and of box over the largest coordinate.
    """
    ones, others = ([part[parts[2] > NONE] for part in parts] for parts in (ones, others))
    distances = torch.full((len(ones[0]),), math.inf)
    if not len(others[0]):
        return distances
    side = others[0].abs().max().clamp(min=1)
    scaled = [
        [parts[0] / side, parts[1][:, None], *(mask.flatten(1) for mask in parts[3:])] for parts in (ones, others)
    ]
    for i, label in enumerate(ones[2]):
        same = others[2] == label
        if same.any():
            apart = [(other[same] - one[i]).abs().amax(1) for one, other in zip(*scaled)]
            distances[i] = torch.stack(apart).amax(0).min()
    return distances


def check_kind(model: nn.Module) -> None:
    """Check that a detector is computed as `Detector` does.

    Raises:
        ValueError: a part is not; the message names it.
    """
    check_part('model', model, RetinaNet, FasterRCNN, MaskRCNN)
    if type(model) is RetinaNet:
        head, configs = model.bbox_head, [model.bbox_head.test_cfg]
        check_part('bbox_head', head, RetinaHead)
    else:
        head, roi_head = model.rpn_head, model.roi_head
        configs = [head.test_cfg, roi_head.test_cfg]
        check_part('rpn_head', head, RPNHead)
        check_part('roi_head', roi_head, StandardRoIHead)
        check_part('roi_head.bbox_head', roi_head.bbox_head, ConvFCBBoxHead, Shared2FCBBoxHead, Shared4Conv1FCBBoxHead)
        check_part('bbox_coder', roi_head.bbox_head.bbox_coder, DeltaXYWHBBoxCoder)
        check_part('bbox_roi_extractor', roi_head.bbox_roi_extractor, SingleRoIExtractor)
        if roi_head.with_mask:
            check_part('mask_roi_extractor', roi_head.mask_roi_extractor, SingleRoIExtractor)
            check_part('mask_head', roi_head.mask_head, FCNMaskHead)
    check_part('bbox_coder', head.bbox_coder, DeltaXYWHBBoxCoder)
    check_part('its anchors', head.prior_generator, AnchorGenerator)
    for config in configs:
        if config.nms.get('type', 'nms') != 'nms':
            raise ValueError(f'--part model: suppression of type {config.nms.type} is not in ONNX: set nms.type=nms')


def check_part(place: str, part: nn.Module, *allowed: type) -> None:
    """Check the class of a part; a subclass may compute something else."""
    if type(part) not in allowed:
        raise ValueError(
            f'--part model: {place} is {type(part).__name__}, and whole detectors are exported with '
            f'{" or ".join(kind.__name__ for kind in allowed)}: export --part neck, and run the heads in PyTorch'
        )


def first_stage(
    head: nn.Module, maps: Sequence[Tensor], score_thr: float, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes of a dense head: `RPNHead._predict_by_feat_single` and `BaseDenseHead._predict_by_feat_single` of mmdet.

    Returns:
        tuple[Tensor]: boxes (B, N, 4), scores (B, N), labels (B, N), where N is the head's ``max_per_img``.
    """
    cfg, levels = head.test_cfg, []
    all_priors = head.prior_generator.grid_priors([level.shape[-2:] for level in maps], device=maps[0].device)
    for i, (scores, deltas, priors) in enumerate(zip(*head(maps), all_priors)):
        scores = scores.permute(0, 2, 3, 1).flatten(1).sigmoid()  # (B, anchors * classes)
        deltas = deltas.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4))  # (B, anchors, 4)
        scores, best = F.pad(scores, (0, cfg.nms_pre), value=NONE).topk(cfg.nms_pre)  # that many in any small map
        anchor, label = best // head.cls_out_channels, best % head.cls_out_channels
        deltas, priors = (F.pad(x, (0, 0, 0, cfg.nms_pre)) for x in (deltas, priors))
        deltas = deltas.gather(1, anchor[..., None].expand(-1, -1, 4))
        levels.append((scores, label, torch.full_like(label, i), deltas, priors[anchor]))
    scores, labels, level, deltas, priors = (torch.cat(parts, 1) for parts in zip(*levels))
    boxes = decode(head.bbox_coder, priors, deltas, height, width)
    if cfg.get('min_bbox_size', -1) >= 0:
        sides = boxes[..., 2:] - boxes[..., :2]
        scores = scores.where((sides > cfg.min_bbox_size).all(-1), NONE)
    apart = level if isinstance(head, RPNHead) else labels
    return keep_best(boxes, scores, labels, apart, cfg.nms.iou_threshold, score_thr, cfg.max_per_img)


def second_stage(
    head: StandardRoIHead, maps: Sequence[Tensor], proposals: Tensor, objectness: Tensor, height: int, width: int
) -> tuple[Tensor, ...]:
    """Boxes and masks of a RoI head: `BBoxHead._predict_by_feat_single` and `multiclass_nms` of mmdet.

    Args:
        proposals (Tensor): (B, P, 4).
        objectness (Tensor): (B, P), `NONE` where there is no proposal.
    """
    cfg, box_head = head.test_cfg, head.bbox_head
    num_classes = box_head.num_classes
    rois = to_rois(proposals)
    pooled = pool(head.bbox_roi_extractor, maps, rois)
    logits, deltas = box_head(pooled)
    shape = objectness.shape
    scores = logits.softmax(-1)[:, :num_classes].view(*shape, num_classes)
    scores = scores.where(objectness[..., None] > NONE, NONE).flatten(1)  # (B, P * classes)
    deltas = deltas.view(*shape, -1, 4).expand(-1, -1, num_classes, -1)
    boxes = decode(box_head.bbox_coder, proposals[:, :, None].expand_as(deltas), deltas, height, width).flatten(1, 2)
    labels = torch.arange(num_classes, device=scores.device).repeat(shape[1]).expand_as(scores)
    boxes, scores, labels = keep_best(
        boxes, scores, labels, labels, cfg.nms.iou_threshold, cfg.score_thr, cfg.max_per_img
    )
    if not head.with_mask:
        return boxes, scores, labels
    masks = head.mask_head(pool(head.mask_roi_extractor, maps, to_rois(boxes))).sigmoid()  # (B * N, classes, h, w)
    if head.mask_head.class_agnostic:
        masks = masks[:, 0]
    else:
        of_label = labels.flatten().clamp(min=0).view(-1, 1, 1, 1).expand(-1, 1, *masks.shape[2:])
        masks = masks.gather(1, of_label)[:, 0]
    return boxes, scores, labels, masks.unflatten(0, labels.shape)


def decode(coder: DeltaXYWHBBoxCoder, priors: Tensor, deltas: Tensor, height: int, width: int) -> Tensor:
    """Boxes (..., 4) from priors (..., 4) and deltas (..., 4), inside the image."""
    boxes = coder.decode(priors.reshape(-1, 4), deltas.reshape(-1, 4))
    x1, y1, x2, y2 = boxes.view(deltas.shape).unbind(-1)
    x1, x2 = (x.clamp(0, width) for x in (x1, x2))
    y1, y2 = (y.clamp(0, height) for y in (y1, y2))
    return torch.stack((x1, y1, x2, y2), -1)


def keep_best(
    boxes: Tensor, scores: Tensor, labels: Tensor, apart: Tensor, iou_thr: float, score_thr: float, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`mmcv.ops.batched_nms`: boxes whose ``apart`` (B, N) differs do not suppress each other."""
    offsets = apart * (boxes.amax((1, 2), keepdim=True)[..., 0] + 1)
    kept = best_boxes(boxes + offsets[..., None], scores, iou_thr, score_thr, limit)  # (B, limit)
    found, index = kept > NONE, kept.clamp(min=0)
    boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4)).where(found[..., None], 0)
    return boxes, scores.gather(1, index).where(found, NONE), labels.gather(1, index).where(found, NONE)


def to_rois(boxes: Tensor) -> Tensor:
    """Boxes (B, N, 4) with the index of their image, (B * N, 5)."""
    images = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)
    return torch.cat((images[:, None, None].expand(-1, boxes.shape[1], 1), boxes), -1).flatten(0, 1)


def pool(extractor: SingleRoIExtractor, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
    """`SingleRoIExtractor.forward` of mmdet: pooled features (K, C, size, size), each from the level of its box."""
    maps = maps[: extractor.num_inputs]
    level = extractor.map_roi_levels(rois, len(maps))
    pooled = 0
    for i, (layer, of_level) in enumerate(zip(extractor.roi_layers, maps)):
        is_here = (level == i)[:, None]
        here = torch.cat((rois[:, :1], rois[:, 1:].where(is_here, 0)), 1)  # of other levels: empty, which costs little
        size, scale = layer.output_size[0], float(layer.spatial_scale)
        features = pool_boxes(of_level, here, size, scale, layer.sampling_ratio, layer.aligned)
        pooled = pooled + features.where(is_here[..., None, None], 0)
    return pooled
