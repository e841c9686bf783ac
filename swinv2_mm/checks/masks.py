"""Checks of the segmentations in COCO's annotations: polygons and run-length codes."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping

import numpy as np

CODES = range(48, 48 + 64)  # the characters that stand for 6 bits each
LONGEST = 12  # characters of a number
FARTHEST = 100  # how far away a point may be, in longer sides of the image: pycocotools draws all lines in memory


def segmentation_problem(segmentation: object, image: Mapping, evaluated: bool) -> str | None:
    """What is wrong with polygons or a run-length code.

    mmdet ignores polygons of fewer than three points, but COCO's evaluation needs three in the first.

    Args:
        segmentation (object): of an annotation.
        image (dict): its image, with ``height`` and ``width`` in pixels.
        evaluated (bool): whether COCO's evaluation reads it.

    Returns:
        str: the problem and its cure; None if there is none.
    """
    if not segmentation:
        return f'segmentation is {reprlib.repr(segmentation)}, and masks are trained or evaluated: add or remove it'
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if not isinstance(polygon, (list, tuple)) or len(polygon) % 2:
                return f'segmentation has {reprlib.repr(polygon)}, must be lists x, y, x, y, ...: correct or remove it'
            try:
                finite = math.isfinite(sum(polygon))
            except TypeError:
                finite = False
            if not finite:
                return f'segmentation has {reprlib.repr(polygon)}, must be finite numbers: correct or remove it'
            if polygon and max(max(polygon), -min(polygon)) > FARTHEST * max(image['height'], image['width']):
                return f'segmentation has {reprlib.repr(polygon)}, far outside the image: correct or remove it'
        if evaluated and len(segmentation[0]) < 6:
            return f'segmentation has {reprlib.repr(segmentation[0])}, must have three points: correct or remove it'
        return None
    if not isinstance(segmentation, Mapping) or not isinstance(segmentation.get('counts'), (list, str)):
        return f'segmentation is {reprlib.repr(segmentation)}, must be polygons or a code with counts'
    size, expected = segmentation.get('size'), [image['height'], image['width']]
    if not isinstance(size, (list, tuple)) or list(size) != expected:
        return f'segmentation has size {reprlib.repr(size)}, must be {expected} as its image: encode it again'
    return None


def rle_problem(code: Mapping, image: Mapping) -> str | None:
    """What is wrong with the counts of a run-length code; None if they cover exactly the image."""
    counts = code['counts']
    try:
        counts = decode_counts(counts) if isinstance(counts, str) else [int(count) for count in counts]
    except (TypeError, ValueError, OverflowError):
        return f'has counts {reprlib.repr(counts)}, which are not a run-length code'
    pixels = image['height'] * image['width']
    if min(counts, default=0) < 0 or sum(counts) != pixels:
        return f'has counts for {sum(counts)} pixels, must be {pixels}'
    return None


def decode_counts(text: str) -> list[int]:
    """Decode the text in which pycocotools writes run lengths.

    A character has 5 bits of a number, the lowest first, and a sixth that says that more follow. From the fourth number
    on they are differences from the last but one.

    Raises:
        ValueError: the text is not such a code.
    """
    codes = np.frombuffer(text.encode('ascii'), np.uint8).astype(np.int64) - CODES.start
    if not len(codes) or codes.min() < 0 or codes.max() >= len(CODES) or codes[-1] & 32:
        raise ValueError('not a run-length code')
    starts = np.concatenate(([0], np.flatnonzero(codes[:-1] & 32 == 0) + 1))
    lengths = np.diff(np.append(starts, len(codes)))
    if lengths.max() > LONGEST:
        raise ValueError('not a run-length code')
    places = np.arange(len(codes)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((codes & 31) << (5 * places), starts)
    negative = codes[starts + lengths - 1] & 16 != 0
    numbers = numbers - (negative.astype(np.int64) << (5 * lengths))
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers.tolist()
