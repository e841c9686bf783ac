"""Checks that the heads of a model have as many classes as its data."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping

from mmengine.dataset import BaseDataset
from mmengine.registry import MODELS

from .registered import class_name, find

# Where detectors and segmentors have heads that classify by the classes of the data. Left out: proposals, which tell
# objects from background, and semantic branches, whose classes are those of other data.
HEADS = (
    *('bbox_head', 'mask_head', 'panoptic_head', 'panoptic_fusion_head', 'decode_head', 'auxiliary_head'),
    *('roi_head.bbox_head', 'roi_head.mask_head', 'roi_head.mask_iou_head', 'roi_head.point_head'),
)
OTHER_CLASSES = ('STDCHead',)  # predicts the outlines of objects
OPEN_VOCABULARY = ('language_model', 'text_encoder')  # parts of models whose classes are words


def heads(model: Mapping) -> Iterator[tuple[str, Mapping]]:
    """The configs of a model's heads by dotted name, one for each stage of a cascade."""
    inner, start = (model['detector'], 'model.detector') if 'detector' in model else (model, 'model')
    for name in HEADS:
        node = inner
        for key in name.split('.'):
            node = node.get(key) if isinstance(node, Mapping) else None
        if isinstance(node, Mapping):
            yield f'{start}.{name}', node
        elif isinstance(node, (list, tuple)):
            yield from ((f'{start}.{name}.{i}', head) for i, head in enumerate(node) if isinstance(head, Mapping))


def ignore_index(model: Mapping) -> int:
    """The label that a segmentor ignores."""
    return next((head['ignore_index'] for _, head in heads(model) if 'ignore_index' in head), 255)


def check_heads(model: Mapping, dataset: BaseDataset, source: str) -> None:
    """Check that every head has as many classes as a data set.

    Args:
        model (dict): config of the model.
        dataset (BaseDataset): the data set.
        source (str): its dotted name in the config, for messages.

    Raises:
        ValueError: a head has more or fewer; the message says which flag corrects it.
    """
    metainfo = dataset.metainfo
    classes = metainfo.get('classes')
    if classes is None or getattr(dataset, 'return_classes', False) or any(key in model for key in OPEN_VOCABULARY):
        return
    for name, head in heads(model):
        if class_name(head.get('type')) in OTHER_CLASSES:
            continue
        for keys, right in _right_counts(metainfo, by_kind=_count(head, 'num_classes') is None):
            counts = [_count(head, key) for key in keys]
            if None in counts or sum(counts) in right or _is_binary(head, sum(counts), right[0]):
                continue
            wrong = ' + '.join(f'{name}.{key}' for key in keys)
            cure = f'add --cfg-options {name}.{keys[0]}={right[0]} or correct metainfo.classes'
            raise ValueError(
                f'{wrong} is {sum(counts)}, and {source} has {right[0]} classes, as {classes[0]!r}: {cure}'
            )


def _right_counts(metainfo, by_kind):
    """The keys of heads that count classes, and what they may sum to; box heads may count only things."""
    total = len(metainfo['classes'])
    panoptic = 'thing_classes' in metainfo and 'stuff_classes' in metainfo
    things, stuff = (len(metainfo[key]) if panoptic else total for key in ('thing_classes', 'stuff_classes'))
    if not by_kind:
        yield ('num_classes',), (total, things)
        return
    if panoptic:
        yield ('num_things_classes',), (things,)
        yield ('num_stuff_classes',), (stuff,)
    yield ('num_things_classes', 'num_stuff_classes'), (total,)


def _is_binary(head, count, expected):
    """Whether one output tells two classes apart."""
    return count == 1 and expected == 2 and head.get('out_channels') in (None, 1)


def _count(head, key):
    """A number in the config of a head, or the default of its class; None if there is none."""
    if key in head:
        return head[key] if isinstance(head[key], int) else None
    kind = find(MODELS, head.get('type'))
    for owner in inspect.getmro(kind) if isinstance(kind, type) else ():
        if '__init__' in vars(owner):
            parameters = inspect.signature(owner.__init__).parameters
            if key in parameters:
                default = parameters[key].default
                return default if isinstance(default, int) else None
            if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
                return None
    return None
