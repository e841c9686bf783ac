"""What can be told about many image files quickly: whether they exist, and their size and mode."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

LIST_FROM = 100  # from this many names in a folder on, listing it costs less than asking for each
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values for images shown turned by 90 degrees


class Header(NamedTuple):
    """What the first bytes of an image file say.

    Attributes:
        sizes (tuple): (width, height) in pixels, as stored and, if that differs, as shown; empty if unknown.
        mode (str): Pillow's mode: L and P have one channel; empty if unknown.
    """

    sizes: tuple[tuple[int, int], ...]
    mode: str


def first_missing(paths: Iterable[str]) -> str | None:
    """The first of these files that does not exist; None if all do."""
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
    """The names of the files directly in a folder; empty if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


def read_header(path: str) -> Header | None:
    """Size and mode of an image, without decoding it; None if the file is not a readable image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about large images
            with Image.open(path) as image:
                turned = image.getexif().get(ORIENTATION) in TURNED if image.format == 'JPEG' else False
                return Header((image.size, image.size[::-1]) if turned else (image.size,), image.mode)
    except Image.DecompressionBombError:
        return Header((), '')
    except Exception:  # a damaged file fails in many ways, and OpenCV reads some that Pillow doesn't
        return Header((), '') if _is_decoded(path) else None


def _is_decoded(path):
    """Whether OpenCV, with which the hosts read images, can decode a file."""
    try:
        content = np.fromfile(path, np.uint8)
        return len(content) > 0 and cv2.imdecode(content, cv2.IMREAD_COLOR) is not None
    except (OSError, cv2.error):
        return False


def spread(items: Sequence, count: int) -> list:
    """At most ``count`` items, evenly spread over all."""
    step = max(1, len(items) / count)
    return [items[int(i * step)] for i in range(min(count, len(items)))]
