"""Checks of annotations in COCO's format: what mmdet silently drops or shifts, or fails on with a traceback.

mmdet numbers the classes in the order of the file's categories and skips those that the file lacks, so one misspelt
name shifts all labels after it.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .images import spread
from .masks import rle_problem, segmentation_problem
from .registered import nearest

DECODED = 20_000  # objects whose run-length codes are read, evenly spread


@dataclass(frozen=True)
class Needs:
    """What a run reads from the annotations besides what mmdet always reads.

    Attributes:
        masks (bool): the pipeline loads masks.
        metrics (tuple[str]): what COCO's evaluation computes from the file: bbox, segm, proposal.
        panoptic (bool): the annotations are COCO's panoptic ones.
        ordered (bool): the config names the classes, so their order is the user's.
        labelled (bool): the run needs objects.
    """

    masks: bool = False
    metrics: tuple[str, ...] = ()
    panoptic: bool = False
    ordered: bool = False
    labelled: bool = True

    @property
    def segmentations(self) -> bool:
        return not self.panoptic and (self.masks or 'segm' in self.metrics)


@dataclass
class Annotations:
    """The part of a checked file that the run uses.

    Attributes:
        images (dict): the images by id.
        categories (dict): by id, in the order of their labels, the names of the categories that are classes.
        annotated (set): ids of the images that have an object of a class.
        objects (int): number of objects that mmdet keeps: of a class, at least one pixel, within their image.
    """

    images: dict
    categories: dict
    annotated: set
    objects: int


def read_json(path: str) -> object:
    """Read a JSON file as pycocotools does.

    Raises:
        ValueError: it can't be read or is not JSON.
    """
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, RecursionError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or str(error)
        raise ValueError(f'{path} is not readable JSON ({reason}): write or copy it again') from error


def check_annotations(path: str, coco: object, classes: Sequence[str], needs: Needs) -> Annotations:
    """Check a file of annotations against the classes of a config.

    Run-length codes are decoded for some objects, evenly spread; everything else is checked in full.

    Args:
        path (str): the file, for messages.
        coco (object): what it holds.
        classes (Sequence[str]): names of the classes.
        needs (Needs): what the run reads.

    Raises:
        ValueError: something is wrong; the message names the file, the place, the value and the cure.
    """
    _check_lists(path, coco, needs.labelled)
    images = _by_id(path, coco, 'images', _image_problem)
    categories = _by_id(path, coco, 'categories', _category_problem)
    if needs.metrics:
        _check_sortable(path, images=images, categories=categories)
    used = _match_classes(path, coco['categories'], classes, needs.ordered)
    annotated, objects, seen, coded = set(), 0, set(), []
    for where, annotation in _segments(path, coco) if needs.panoptic else _objects(coco):
        problem = _annotation_problem(annotation, images, categories, used, needs)
        if not problem and annotation['id'] in seen:
            problem = f'id {annotation["id"]!r} occurs twice, must be unique: renumber the annotations'
        if problem:
            raise ValueError(f'{path}: {where}: {problem}')
        if not needs.panoptic:  # segments of different images may share an id
            seen.add(annotation['id'])
        if annotation['category_id'] not in used:
            continue
        image = images[annotation['image_id']]
        kept = _is_kept(annotation, image)
        objects += kept
        if not needs.panoptic or (kept and _is_thing(annotation, categories)):  # as mmdet filters
            annotated.add(image['id'])
        if kept and needs.segmentations and isinstance(annotation['segmentation'], Mapping):
            coded.append((where, annotation['segmentation'], image))
    for where, code, image in spread(coded, DECODED):
        problem = rle_problem(code, image)
        if problem:
            raise ValueError(f'{path}: {where}: segmentation {problem}: encode it again')
    return Annotations(images, used, annotated, objects)


def _check_lists(path, coco, labelled):
    """Check that a file has lists of dicts where COCO's have them."""
    if not isinstance(coco, Mapping):
        raise ValueError(
            f'{path} holds a {type(coco).__name__}, not a dict with images, annotations and categories: '
            'export it as COCO JSON'
        )
    for key in ('images', 'categories', 'annotations'):
        if key == 'annotations' and key not in coco and not labelled:
            continue
        if not isinstance(coco.get(key), list):
            have = f'{key} as {reprlib.repr(coco[key])}' if key in coco else f'no {key!r}'
            raise ValueError(f'{path} has {have}, must have a list of them: export it as COCO JSON')
        for number, entry in enumerate(coco[key]):
            if not isinstance(entry, Mapping):
                raise ValueError(
                    f'{path}: {key}[{number}] is {reprlib.repr(entry)}, must be a dict: correct or remove it'
                )
    if not coco['images']:
        raise ValueError(f'{path} lists no images: name the file of the images with ann_file')


def _objects(coco):
    for number, annotation in enumerate(coco.get('annotations', ())):
        yield f'annotations[{number}]', annotation


def _segments(path, coco):
    """The segments of panoptic annotations, each with the id of its image."""
    for number, annotation in enumerate(coco.get('annotations', ())):
        where = f'annotations[{number}]'
        segments = annotation.get('segments_info')
        if not isinstance(segments, list) or not all(isinstance(segment, Mapping) for segment in segments):
            raise ValueError(
                f'{path}: {where}: segments_info is {reprlib.repr(segments)}, must be a list of dicts: '
                'name a panoptic file with ann_file'
            )
        for place, segment in enumerate(segments):
            yield f'{where}.segments_info[{place}]', {**segment, 'image_id': annotation.get('image_id')}


def _by_id(path, coco, key, problem_of):
    """Images or categories by their id."""
    found = {}
    for number, entry in enumerate(coco[key]):
        problem = problem_of(entry)
        if not problem and not _is_id(entry['id']):
            problem = f'id is {reprlib.repr(entry["id"])}, must be a number'
        if not problem and entry['id'] in found:
            problem = f'id {entry["id"]!r} occurs twice, must be unique'
        if problem:
            raise ValueError(f'{path}: {key}[{number}]: {problem}: correct or remove it')
        found[entry['id']] = entry
    return found


def _check_sortable(path, **kinds):
    """Check that ids can be sorted, as COCO's evaluation does."""
    for kind, ids in kinds.items():
        text = next((one for one in ids if isinstance(one, str)), None)
        if text is not None and not all(isinstance(one, str) for one in ids):
            raise ValueError(f'{path}: {kind} have the id {text!r} and others that are numbers: renumber them')


def _image_problem(image):
    for key in ('id', 'file_name', 'height', 'width'):
        if key not in image:
            return f'has no {key!r}'
    if not isinstance(image['file_name'], str) or not image['file_name']:
        return f'file_name is {reprlib.repr(image["file_name"])}, must be a path'
    for key in ('height', 'width'):
        if not _is_number(image[key]) or image[key] <= 0:
            return f'{key} is {reprlib.repr(image[key])}, must be the pixels of {image["file_name"]!r}'
    return None


def _category_problem(category):
    for key in ('id', 'name'):
        if key not in category:
            return f'has no {key!r}'
    return None if isinstance(category['name'], str) else f'name is {reprlib.repr(category["name"])}, must be a string'


def _match_classes(path, categories, classes, ordered):
    """Names by id of the categories that are classes, in the order in which mmdet numbers them."""
    names = [category['name'] for category in categories]
    missing = [name for name in classes if name not in set(names)]
    unused = [name for name in names if name not in set(classes)]
    if missing:
        others = f', nor {len(missing) - 1} more of the {len(classes)} classes' if missing[1:] else ''
        close = nearest(missing[0], unused)
        cure = f'correct the name, the nearest in the file is {close!r}' if close else f'it has {_listed(names)}'
        raise ValueError(
            f'{path} has no category {missing[0]!r} of the config{others}: {cure}; '
            'names and number of classes are metainfo.classes and num_classes'
        )
    used = [name for name in names if name in set(classes)]
    name, times = Counter(used).most_common(1)[0]
    if times > 1:
        raise ValueError(f'{path} has {times} categories {name!r}, must have one: give each class a name of its own')
    if ordered and used != list(classes):
        place = next(i for i, (one, other) in enumerate(zip(used, classes)) if one != other)
        raise ValueError(
            f'{path} has {used[place]!r} where metainfo.classes has {classes[place]!r}, and mmdet numbers classes in '
            f'the order of the file: set classes=({_listed(used, len(used))})'
        )
    return {category['id']: category['name'] for category in categories if category['name'] in set(classes)}


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_id(value):
    return isinstance(value, str) or _is_number(value)


def _listed(names, most=6):
    return ', '.join(map(repr, names[:most])) + (' ...' if names[most:] else '')


def _annotation_problem(annotation, images, categories, used, needs):
    """What is wrong with an annotation, and the cure; None if nothing is."""
    problem = _reference_problem(annotation, images, categories, used if needs.panoptic else None)
    counts = not problem and annotation['category_id'] in used
    if problem or (annotation.get('ignore') and not (needs.metrics and counts)):  # mmdet reads no more of it
        return problem
    problem = _box_problem(annotation, counts)
    if problem or not counts:
        return problem
    if needs.metrics and not needs.panoptic:
        problem = _evaluation_problem(annotation)
    image = images[annotation['image_id']]
    if not problem and needs.segmentations and ('segm' in needs.metrics or _is_kept(annotation, image)):
        problem = segmentation_problem(annotation.get('segmentation'), image, 'segm' in needs.metrics)
    return problem


def _reference_problem(annotation, images, categories, classes):
    """What is wrong with the ids of an annotation; the categories of panoptic ones must be classes."""
    for key in ('id', 'image_id', 'category_id'):
        if key not in annotation:
            return f'has no {key!r}: correct or remove it'
        if not _is_id(annotation[key]):
            return f'{key} is {reprlib.repr(annotation[key])}, must be a number: correct or remove it'
    if annotation['image_id'] not in images:
        return f'image_id {annotation["image_id"]!r} is not the id of an image: correct or remove it'
    number = annotation['category_id']
    if number not in categories:
        return f'category_id {number!r} is not the id of a category: correct or remove it'
    name = categories[number]['name']
    if classes is not None and number not in classes:
        return f'category {name!r} is not one of the classes: add it to metainfo.classes'
    if classes is not None and 'isthing' not in categories[number]:
        return f'category {name!r} has no isthing: name a panoptic file with ann_file'
    return None


def _box_problem(annotation, counts):
    """What is wrong with box and area. If the category is not a class, mmdet only needs a box of four entries."""
    for key in ('bbox', 'area'):
        if key not in annotation:
            return f'has no {key!r}: add or remove it'
    box, area = annotation['bbox'], annotation['area']
    if not isinstance(box, (list, tuple)) or len(box) != 4:
        return f'bbox is {reprlib.repr(box)}, must be x, y, width, height: correct or remove it'
    if counts and not (all(map(_is_number, box)) and min(box[2:]) >= 0):
        return (
            f'bbox is {reprlib.repr(box)}, must be finite x, y, width, height, no size negative: correct or remove it'
        )
    if counts and not (_is_number(area) and area >= 0):
        return f'area is {reprlib.repr(area)}, must be pixels: correct or remove it'
    return None


def _evaluation_problem(annotation):
    """What is wrong with the keys that only COCO's evaluation reads."""
    number, crowd = annotation['id'], annotation.get('iscrowd')
    if not isinstance(crowd, (bool, int)):
        return f"iscrowd is {reprlib.repr(crowd)}, and COCO's evaluation reads it: write 0, or 1 for crowds"
    if not (_is_number(number) or number.isdigit()):
        return f"id is {number!r}, and COCO's evaluation takes only numbers: renumber the annotations"
    return None


def _is_kept(annotation, image):
    """Whether mmdet keeps an annotation of a class."""
    if annotation.get('ignore') or annotation['area'] <= 0:
        return False
    x, y, width, height = annotation['bbox']
    inside = min(x + width, image['width']) > max(x, 0) and min(y + height, image['height']) > max(y, 0)
    return inside and width >= 1 and height >= 1


def _is_thing(annotation, categories):
    return bool(categories[annotation['category_id']]['isthing']) and not annotation.get('iscrowd')


def select_images(annotations: Annotations, filter_cfg: Mapping | None) -> list:
    """The images that mmdet keeps in training, in the order of the file."""
    chosen = list(annotations.images.values())
    if filter_cfg:
        smallest = filter_cfg.get('min_size', 0)
        chosen = [image for image in chosen if min(image['width'], image['height']) >= smallest]
        if filter_cfg.get('filter_empty_gt', False):
            chosen = [image for image in chosen if image['id'] in annotations.annotated]
    return chosen


def check_same(path: str, found: Annotations, other: str, of_metric: Annotations) -> None:
    """Check that a metric's file has the images and categories of the data set that it evaluates.

    Args:
        path (str), found (Annotations): the file of the data set and what it holds.
        other (str), of_metric (Annotations): the same for the metric.

    Raises:
        ValueError: an image is missing, or categories have other ids.
    """
    lost = next((image for image in found.images if image not in of_metric.images), None)
    if lost is not None:
        raise ValueError(
            f'{other}, which the metric reads, has no image with id {lost!r} of {path}: name one file in both'
        )
    if [i for i in found.categories if found.categories[i] in of_metric.categories.values()] != list(
        of_metric.categories
    ):
        raise ValueError(f'{other}, which the metric reads, has other categories than {path}: name one file in both')
