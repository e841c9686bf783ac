"""Detections as COCO publishes them: categories, images and results with their ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import ConfigDict
from mmengine.registry import DATASETS
from mmengine.structures import InstanceData

# The ids of the 80 classes of COCO in the order of mmdet, which knows the names alone.
COCO_IDS = sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})


def read_annotations(dataset: ConfigDict) -> dict:
    """The annotations of a data set of a config; {} if they are missing or not in COCO's format."""
    try:
        annotations = json.loads(Path(dataset.get('data_root') or '', dataset.get('ann_file') or '').read_text())
    except (OSError, ValueError):
        return {}
    return annotations if isinstance(annotations, dict) else {}


def list_categories(meta: dict, annotations: dict) -> list[dict]:
    """The COCO category, id and name, of each label of a detector."""
    names = list(meta.get('thing_classes') or meta['classes'])  # of a panoptic data set, or of any other
    known = [category for category in annotations.get('categories', []) if category['name'] in names]
    if len(known) == len(names):  # labels count in the order of the annotations, as in mmdet's CocoDataset
        return [{'id': category['id'], 'name': category['name']} for category in known]
    is_coco = names == list(DATASETS.get('mmdet.CocoDataset').METAINFO['classes'])
    ids = COCO_IDS if is_coco else range(1, len(names) + 1)
    return [{'id': i, 'name': name} for i, name in zip(ids, names)]


def list_image_ids(names: Sequence[str], annotations: dict) -> dict[str, int]:
    """The COCO id of each image: from the annotations, else the number in its name, else counted from 1."""
    known = {image['file_name']: image['id'] for image in annotations.get('images', [])}
    stems = [Path(name).stem for name in names]
    for ids in ([known.get(name) for name in names], [int(stem) if stem.isdecimal() else None for stem in stems]):
        if None not in ids and len(set(ids)) == len(ids):
            return dict(zip(names, ids))
    return {name: i for i, name in enumerate(names, 1)}


def coco_results(instances: InstanceData, image_id: int, categories: list[dict]) -> list[dict]:
    """Detections in COCO's format for results.

    Args:
        instances (InstanceData): N objects: ``bboxes``, (N, 4), x1, y1, x2, y2 in pixels; ``scores`` and ``labels``,
            (N,); and optionally ``masks``, (N, H, W), bool.
        image_id (int): id of the image.
        categories (list): by label.
    """
    from mmdet.structures.mask import encode_mask_results  # a segmentor does not need mmdet

    results = [
        {
            'image_id': image_id,
            'category_id': categories[label]['id'],
            'bbox': [x1, y1, x2 - x1, y2 - y1],
            'score': score,
        }
        for (x1, y1, x2, y2), score, label in zip(
            instances.bboxes.tolist(), instances.scores.tolist(), instances.labels.tolist()
        )
    ]
    if 'masks' in instances:
        for result, rle in zip(results, encode_mask_results(instances.masks.numpy())):
            result['segmentation'] = {'size': rle['size'], 'counts': rle['counts'].decode('ascii')}
    return results
