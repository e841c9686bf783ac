"""Two operators of mmcv with outputs of fixed sizes, and how they are written in operators of ONNX."""

from __future__ import annotations

import torch
from mmcv.ops import nms, roi_align
from torch import Tensor

NONE = -1  # index, score and label of a box that is none


@torch.library.custom_op('swinv2_mm_export::best_boxes', mutates_args=())
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


@torch.library.custom_op('swinv2_mm_export::pool_boxes', mutates_args=())
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
        chosen = op.NonMaxSuppression(  # (M, 3): image, class and box, by image and score in the runtimes that we tried
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
