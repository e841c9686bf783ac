"""Checks of images and label maps of semantic segmentation, as mmseg's data sets list them."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from .images import file_names, first_missing, read_header, spread

DECODED = 50  # label maps of a data set whose values are read, evenly spread
ONE_CHANNEL = ('1', 'L', 'P', 'I', 'F', 'I;16', 'I;16B', 'I;16L', 'I;16N')  # modes of Pillow


def check_some_images(dataset, pairs: Sequence[Mapping], source: str) -> None:
    """Check that a data set of mmseg has images at all.

    Args:
        dataset (BaseSegDataset): the data set.
        pairs (Sequence[dict]): what it lists.
        source (str): its dotted name in the config, for the message.

    Raises:
        ValueError: it has none; the message says what is in the folder instead.
    """
    if pairs:
        return
    folder, suffix = dataset.data_prefix.get('img_path') or '', dataset.img_suffix
    if dataset.ann_file and os.path.isfile(dataset.ann_file):
        raise ValueError(f'{dataset.ann_file} names no images: write one name per line, without {suffix}')
    kinds = Counter(os.path.splitext(name)[1] for name in file_names(folder))
    have = kinds.most_common(1)[0][0] if kinds else None
    if have and not suffix.endswith(have):
        cure = f'it holds {kinds[have]} of {have!r}: set img_suffix of {source}'
    else:
        cure = 'put the images there or name their folder with --data-root or data_prefix'
    raise ValueError(f'{folder} holds no images that end with {suffix!r}: {cure}')


def check_pairs(pairs: Sequence[Mapping], with_maps: bool, seg_map_suffix: str, source: str) -> None:
    """Check that images and label maps exist.

    Args:
        pairs (Sequence[dict]): ``img_path`` and ``seg_map_path`` of each image.
        with_maps (bool): whether label maps are loaded.
        seg_map_suffix (str): how the names of label maps end.
        source (str): dotted name of the data set in the config, for messages.

    Raises:
        ValueError: one is missing; the message says what is there instead.
    """
    missing = first_missing(pair['img_path'] for pair in pairs)
    if missing:
        raise ValueError(f'{missing} does not exist: put the image there or remove it from the list of {source}')
    if not with_maps:
        return
    if not all('seg_map_path' in pair for pair in pairs):
        raise ValueError(f'{source} has no label maps: name their folder with data_prefix.seg_map_path')
    missing = first_missing(pair['seg_map_path'] for pair in pairs)
    if missing:
        raise ValueError(f'{missing} does not exist: {_cure_of_missing_map(missing, seg_map_suffix, source)}')


def _cure_of_missing_map(path, suffix, source):
    """The cure of a missing label map: another suffix, if a file differs only in that."""
    folder, name = os.path.split(path)
    stem = name[: len(name) - len(suffix)]
    other = next((name for name in sorted(file_names(folder)) if stem and name.startswith(stem)), None)
    if other:
        return f'there is {other}, set seg_map_suffix of {source} to {other[len(stem) :]!r} if that is the label map'
    return 'put the label map of the image there'


def check_headers(image_path: str, map_path: str) -> None:
    """Check that a label map fits its image, without decoding them.

    Raises:
        ValueError: one of them is not an image, or the label map has several channels or another size.
    """
    label_map = read_header(map_path)
    if label_map is None:
        raise ValueError(f'{map_path} is not a readable image: write or copy it again')
    if label_map.mode and label_map.mode not in ONE_CHANNEL:
        raise ValueError(f'{map_path} has mode {label_map.mode}, must have one channel, the number of the class')
    image = read_header(image_path)
    if image is None:
        raise ValueError(f'{image_path} is not a readable image: write or copy it again')
    if image.sizes and label_map.sizes and not set(image.sizes) & set(label_map.sizes):
        width, height = label_map.sizes[0]
        raise ValueError(
            f'{map_path} has {width} x {height} pixels, and its image {image_path} has '
            f'{image.sizes[0][0]} x {image.sizes[0][1]}: they must have the same size'
        )


def check_values(
    pairs: Sequence[Mapping], classes: int, reduce_zero_label: bool, ignore_index: int, most: int = DECODED
) -> None:
    """Check that the values of label maps are numbers of classes, in a sample of evenly spread maps.

    Args:
        pairs (Sequence[dict]): ``seg_map_path`` and ``label_map`` of each image.
        classes (int): number of classes.
        reduce_zero_label (bool): whether 0 is ignored and classes count from 1.
        ignore_index (int): the label that is ignored after that.
        most (int): size of the sample.

    Raises:
        ValueError: a value is not the number of a class; or all pixels of the sample are ignored.
    """
    labelled = not pairs
    for pair in spread(pairs, most):
        path = pair['seg_map_path']
        values = _values(path)
        labels = host_labels(values, reduce_zero_label, pair.get('label_map'))
        wrong = (labels != ignore_index) & ((labels >= classes) | (values < 0) | (values > 255))
        if wrong.any():
            first, last = (1, classes) if reduce_zero_label else (0, classes - 1)
            also = f', 0 and {ignore_index} to be ignored' if reduce_zero_label else f', {ignore_index} to be ignored'
            raise ValueError(
                f'{path} has the value {values[wrong][0]}, and with {classes} classes and '
                f'reduce_zero_label={reduce_zero_label} values go from {first} to {last}{also}: correct one of these'
            )
        labelled = labelled or bool((labels != ignore_index).any())
    if not labelled:
        path = pairs[0]['seg_map_path']
        raise ValueError(
            f'{path} and all other label maps that were read have only pixels to be ignored, with '
            f'reduce_zero_label={reduce_zero_label} and ignore_index={ignore_index}: correct one of these'
        )


def _values(path):
    """The different values of a label map, sorted."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with Image.open(path) as image:
                pixels = np.asarray(image)
    except Exception as error:  # a damaged file fails in many ways
        raise ValueError(f'{path} is not a readable image: write or copy it again') from error
    if pixels.dtype in (np.uint8, np.uint16):
        return np.flatnonzero(np.bincount(pixels.ravel()))
    return np.unique(pixels)


def host_labels(values: np.ndarray, reduce_zero_label: bool, label_map: Mapping[int, int] | None) -> np.ndarray:
    """The labels that mmseg's `LoadAnnotations` makes from the values in a file, (N,) to (N,)."""
    labels = values.astype(np.int64) & 255  # it takes them as uint8
    if reduce_zero_label:
        labels = np.where((labels == 0) | (labels == 255), 255, labels - 1)
    if label_map:
        labels = np.array([label_map.get(label, label) for label in labels.tolist()], np.int64)
    return labels
