"""RetinaNet, Faster and Mask R-CNN of mmdet as graphs of standard operators, with the layers of mmdet.

What mmdet computes for as many boxes as it finds is computed here for as many as there may be, and a score of -1 marks
those that are none. So no shape depends on what is in an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmcv.ops import RoIAlign
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
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from .onnx_models import Exported, check_class
from .onnx_operators import NONE, best_boxes, pool_boxes, translations

UNMATCHED = 0.02  # of an image's boxes at most: between two that are as good, rounding decides which one is kept


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

    def spread_scores(self) -> None:
        model = self.model
        is_retina = isinstance(model, RetinaNet)
        layers = (
            [model.bbox_head.retina_cls] if is_retina else [model.rpn_head.rpn_cls, model.roi_head.bbox_head.fc_cls]
        )
        for layer in layers:
            nn.init.normal_(layer.weight, std=0.1)

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

    def predict(self, image: Tensor) -> tuple[Tensor, ...]:
        """What mmdet's own heads predict, as `compute` gives it."""
        image, height, width = self.prepare(image)
        meta = dict(img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0))
        samples = [DetDataSample(metainfo=dict(meta, batch_input_shape=tuple(image.shape[2:]))) for _ in image]
        model, maps = self.model, self.model.extract_feat(image)
        if isinstance(model, RetinaNet):
            limit, results = model.bbox_head.test_cfg.max_per_img, model.bbox_head.predict(maps, samples, rescale=False)
        else:
            head, metas = model.roi_head, [sample.metainfo for sample in samples]
            proposals = model.rpn_head.predict(maps, samples, rescale=False)
            results = head.predict_bbox(maps, metas, proposals, head.test_cfg, rescale=False)
            limit = head.test_cfg.max_per_img
        boxes, scores, labels = (
            torch.stack(
                [
                    F.pad(found[key], (0, 0) * (found[key].ndim - 1) + (0, limit - len(found)), value=fill)
                    for found in results
                ]
            )
            for key, fill in (('bboxes', 0), ('scores', NONE), ('labels', NONE))
        )
        if isinstance(model, RetinaNet) or not model.roi_head.with_mask:
            return boxes, scores, labels
        masks = model.roi_head._mask_forward(maps, to_rois(boxes))['mask_preds'].sigmoid()
        return boxes, scores, labels, masks_of_labels(masks, labels)

    def expected(self, image: Tensor) -> tuple[Tensor, ...]:
        """`predict` with a score threshold of 0."""
        config = (self.model.bbox_head if isinstance(self.model, RetinaNet) else self.model.roi_head).test_cfg
        threshold = config.get('score_thr', 0)
        config.score_thr = 0
        try:
            return self.predict(image)
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
            distances[i] = torch.stack(apart).amax(0).min().nan_to_num(math.inf)
    return distances


def check_kind(model: nn.Module) -> None:
    """Check that a detector is computed as `Detector` does.

    Raises:
        ValueError: a part or a setting is not; the message names it.
    """
    check_class('model', model, RetinaNet, FasterRCNN, MaskRCNN)
    if type(model) is RetinaNet:
        head = model.bbox_head
        check_class('bbox_head', head, RetinaHead)
        check_settings('test_cfg', head.test_cfg, 'nms_pre', 'max_per_img')
    else:
        head = model.rpn_head
        check_class('rpn_head', head, RPNHead)
        check_settings('test_cfg.rpn', head.test_cfg, 'nms_pre', 'max_per_img')
        check_roi_head(model.roi_head)
    check_class('bbox_coder', head.bbox_coder, DeltaXYWHBBoxCoder)
    check_class('anchor_generator', head.prior_generator, AnchorGenerator)
    check_setting('loss_cls.use_sigmoid', head.use_sigmoid_cls, True)
    check_setting('loss_cls.custom_cls_channels', getattr(head.loss_cls, 'custom_cls_channels', False), False)
    check_setting('bbox_coder.clip_border', head.bbox_coder.clip_border, True)


def check_roi_head(roi_head: nn.Module) -> None:
    """`check_kind` of the second stage."""
    check_class('roi_head', roi_head, StandardRoIHead)
    check_settings('test_cfg.rcnn', roi_head.test_cfg, 'max_per_img')
    check_setting('roi_head.shared_head', roi_head.with_shared_head, False)
    head = roi_head.bbox_head
    check_class('roi_head.bbox_head', head, ConvFCBBoxHead, Shared2FCBBoxHead, Shared4Conv1FCBBoxHead)
    check_class('bbox_coder', head.bbox_coder, DeltaXYWHBBoxCoder)
    check_setting('bbox_coder.clip_border', head.bbox_coder.clip_border, True)
    check_setting('roi_head.bbox_head.with_reg', head.with_reg, True)
    check_setting('roi_head.bbox_head.loss_cls.custom_cls_channels', head.custom_cls_channels, False)
    extractors = [roi_head.bbox_roi_extractor]
    if roi_head.with_mask:
        check_class('mask_head', roi_head.mask_head, FCNMaskHead)
        extractors.append(roi_head.mask_roi_extractor)
    for extractor in extractors:
        check_class('roi_extractor', extractor, SingleRoIExtractor)
        for layer in extractor.roi_layers:
            check_class('roi_layer', layer, RoIAlign)
            check_setting('roi_layer.pool_mode', layer.pool_mode, 'avg')
            check_setting('roi_layer.use_torchvision', layer.use_torchvision, False)
            check_setting('roi_layer.output_size', layer.output_size, (layer.output_size[0],) * 2)


def check_setting(name: str, value, needed) -> None:
    """Check a setting that whole detectors are exported with.

    Raises:
        ValueError: it has another value.
    """
    if value != needed:
        raise ValueError(
            f'--part model: {name} is {value}, and whole detectors are exported with {needed}: export --part neck, and '
            'run the heads in PyTorch'
        )


def check_settings(name: str, config: dict, *numbers: str) -> None:
    """Check the numbers and the suppression that a ``test_cfg`` asks for.

    Raises:
        ValueError: a number is no positive one, or there is a suppression that ONNX does not have.
    """
    for number in numbers:
        value = config.get(number)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f'--part model: {name}.{number} is {value}: set how many boxes there may be, such as 100')
    nms = config.get('nms') or {}
    others = {key: nms[key] for key in set(nms) - {'type', 'iou_threshold', 'split_thr'}}
    if nms.get('type', 'nms') != 'nms' or 'iou_threshold' not in nms or others:
        raise ValueError(
            f'--part model: {name}.nms is {dict(nms)}, and ONNX has dict(type="nms", iou_threshold=...): set that'
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
    masks = head.mask_head(pool(head.mask_roi_extractor, maps, to_rois(boxes))).sigmoid()
    return boxes, scores, labels, masks_of_labels(masks, labels)


def masks_of_labels(masks: Tensor, labels: Tensor) -> Tensor:
    """Of the masks (B * N, classes, h, w), or (B * N, 1, h, w) for any class, those of the labels (B, N)."""
    index = labels.flatten().clamp(0, masks.shape[1] - 1).view(-1, 1, 1, 1).expand(-1, 1, *masks.shape[2:])
    return masks.gather(1, index)[:, 0].unflatten(0, labels.shape)


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
        here = torch.cat((rois[:, :1], rois[:, 1:].where(is_here, 0)), 1)  # of other levels: empty, so of few samples
        size, scale = layer.output_size[0], float(layer.spatial_scale)
        features = pool_boxes(of_level, here, size, scale, layer.sampling_ratio, layer.aligned)
        pooled = pooled + features.where(is_here[..., None, None], 0)
    return pooled
