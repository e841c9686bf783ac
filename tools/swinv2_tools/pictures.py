"""Check image files, and turn images of any depth into pictures to look at."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2

Image.MAX_IMAGE_PIXELS = None  # check_pixels takes its place


def check_whole(path: Path, max_pixels: int) -> None:
    """Check that an image is complete: OpenCV decodes a truncated JPEG as far as it goes.

    Raises:
        ValueError: the file is empty, or the image has too many pixels, which is found before it is decoded.
        OSError: the file is truncated.
    """
    if not path.stat().st_size:
        raise ValueError('the file is empty')
    try:
        with Image.open(path) as image:
            check_pixels(*image.size, max_pixels)
            image.load()
    except UnidentifiedImageError:  # OpenCV, tifffile or GDAL may still read it
        check_pixels(*tiff_size(path), max_pixels)


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raise a ValueError if an image has too many pixels."""
    if width * height > max_pixels:
        raise ValueError(f'its {width} x {height} pixels are more than --max-pixels {max_pixels}')


def tiff_size(path: Path) -> tuple[int, int]:
    """Read width and height of a TIFF with any channels from its header. Gives 0, 0 for other files."""
    with path.open('rb') as file:
        start = file.read(8)
        start += file.read(8) if start[2:3] == b'+' else b''  # a BigTIFF
        try:
            header = ImageFileDirectory_v2(start)
            file.seek(header.next)
            header.load(file)
        except Exception:  # Pillow's, of all kinds
            return 0, 0
        return header.get(256, 0), header.get(257, 0)


def to_picture(image: np.ndarray, is_rgb: bool) -> np.ndarray:
    """Turn an image into a picture to look at.

    Args:
        image (np.ndarray): (H, W) or (H, W, C), of any depth.
        is_rgb (bool): whether the first three channels are red, green and blue, else blue, green and red.

    Returns:
        np.ndarray: (H, W, 3), RGB, 8 bits, a copy. Whole numbers from 0 to 255 are as they were. Others are scaled such
        that the darkest hundredth is 0 and the brightest is 255; what is not a number is 0.
    """
    image = np.atleast_3d(image)  # (H, W, C)
    order = (0, 0, 0) if image.shape[2] < 3 else (0, 1, 2) if is_rgb else (2, 1, 0)
    image = image.take(order, axis=2)  # (H, W, 3)
    if image.min() >= 0 and image.max() <= 255 and (image == image.round()).all():
        return image.astype(np.uint8)
    step = math.isqrt(image.shape[0] * image.shape[1]) // 1000 or 1  # a million pixels tell enough
    sample = image[::step, ::step]
    sample = sample[np.isfinite(sample)]
    low, high = np.percentile(sample, (1, 99)).tolist() if sample.size else (0, 0)
    image = (image.astype(np.float32) - low) * (255 / (high - low or 1))
    return np.nan_to_num(image, copy=False).clip(0, 255).astype(np.uint8)
