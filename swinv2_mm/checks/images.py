"""What can be told of many image files in little time: which are there, and of what size and kind."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

LIST_FROM = 100  # names in a folder; from this many on it is listed, which costs less than to ask for each
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values for images shown turned by 90 degrees


class Header(NamedTuple):
    """What the first bytes of an image file say.

    Attributes:
        sizes (tuple): (width, height) in pixels, as stored and, where that differs, as shown; empty if unknown.
        mode (str): Pillow's name of the kind of pixels: L and P have one channel; empty if unknown.
    """

    sizes: tuple[tuple[int, int], ...]
    mode: str


def first_missing(paths: Iterable[str]) -> str | None:
    """The first of some files that is not there; None if all are."""
    by_folder = {}
    for path in paths:
        by_folder.setdefault(os.path.dirname(path), []).append(path)
    for folder, members in by_folder.items():
        if len(members) < LIST_FROM:
            missing = (path for path in members if not os.path.isfile(path))
        else:
            names = file_names(folder)
            missing = (path for path in members if os.path.basename(path) not in names)
        path = next(missing, None)
        if path is not None:
            return path
    return None


def file_names(folder: str) -> set[str]:
    """The names of the files right in a folder; none if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


def read_header(path: str) -> Header | None:
    """Size and kind of an image, without decoding it; None if the file is no image or can't be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of many pixels
            with Image.open(path) as image:
                turned = image.getexif().get(ORIENTATION) in TURNED if image.format == 'JPEG' else False
                return Header((image.size, image.size[::-1]) if turned else (image.size,), image.mode)
    except Image.DecompressionBombError:
        return Header((), '')
    except Exception:  # a damaged file fails in many ways, and OpenCV reads some that Pillow doesn't
        return Header((), '') if _is_decoded(path) else None


def _is_decoded(path):
    """Whether OpenCV, with which the hosts read images, makes an image of a file."""
    try:
        content = np.fromfile(path, np.uint8)
        return len(content) > 0 and cv2.imdecode(content, cv2.IMREAD_COLOR) is not None
    except (OSError, cv2.error):
        return False


def spread(items: Sequence, count: int) -> list:
    """At most ``count`` items, evenly spread over all."""
    step = max(1, len(items) / count)
    return [items[int(i * step)] for i in range(min(count, len(items)))]
