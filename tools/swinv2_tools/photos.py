"""Photos in a folder per class, ``SPLIT/CLASS/*.jpg``, as squares of one size."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from swinv2_tools.image_files import EXTENSIONS
from swinv2_tools.progress import track

AREA, ASPECT = (0.35, 1.0), (3 / 4, 4 / 3)  # of random crops: range of the area, of the photo's; of width over height


class Photos(NamedTuple):
    """Square photos and their labels.

    Attributes:
        pixels (ndarray): (N, S, S, 3), uint8, BGR.
        labels (ndarray): (N,), places in ``classes``.
        classes (tuple[str]): the names of the folders.
        enlarged (int): how many of the photos were smaller than S pixels.
    """

    pixels: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    enlarged: int


def read_photos(root: Path, split: str, size: int) -> Photos:
    """Read the photos of a split: the middle square of each, resized to one size.

    Args:
        root (Path): has a folder per split, and in it a folder per class.
        split (str): train or val.
        size (int): S in pixels.

    Raises:
        ValueError: there is no photo, a class has none, or one can't be read.
    """
    folder = root / split
    folders = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if len(folders) < 2:
        raise ValueError(f'{folder} has fewer than two folders: photos must lie at {root}/{split}/CLASS/*.jpg')
    found, squares, enlarged = [], [], 0
    for label, of_class in enumerate(folders):
        paths = sorted(path for path in of_class.rglob('*') if path.suffix.lower() in EXTENSIONS)
        if not paths:
            raise ValueError(f'{of_class} has no photo: add some that end in {", ".join(EXTENSIONS)}, or remove it')
        found += [(path, label) for path in paths]
    for path, _ in track(found):
        photo = cv2.imread(str(path))
        if photo is None:
            raise ValueError(f'{path} cannot be read as an image: remove it')
        enlarged += min(photo.shape[:2]) < size
        squares.append(resize(middle_square(photo), size))
    return Photos(
        np.stack(squares), np.array([label for _, label in found]), tuple(path.name for path in folders), enlarged
    )


def middle_square(photo: np.ndarray) -> np.ndarray:
    """The largest square in the middle of a photo (H, W, 3)."""
    height, width = photo.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return photo[top : top + side, left : left + side]


def resize(photo: np.ndarray, size: int) -> np.ndarray:
    """A photo (H, W, 3) at (size, size, 3): reduced by averaging areas, enlarged bicubically."""
    if photo.shape[:2] == (size, size):
        return photo
    return cv2.resize(
        photo, (size, size), interpolation=cv2.INTER_AREA if min(photo.shape[:2]) >= size else cv2.INTER_CUBIC
    )


def at_size(pixels: np.ndarray, size: int) -> Tensor:
    """Photos (N, S, S, 3) as a tensor (N, 3, size, size), uint8."""
    resized = np.stack([resize(photo, size) for photo in pixels])
    return torch.from_numpy(resized.transpose(0, 3, 1, 2).copy())


class RandomCrops(Dataset):
    """Random crops of photos, mirrored at random, (3, size, size), uint8, and their labels."""

    def __init__(self, photos: Photos, size: int):
        self.photos, self.size = photos, size

    def __len__(self) -> int:
        return len(self.photos.labels)

    def __getitem__(self, i: int) -> dict:
        crop = random_crop(self.photos.pixels[i])[:, :: np.random.choice((-1, 1))]
        inputs = resize(np.ascontiguousarray(crop), self.size).transpose(2, 0, 1)
        return dict(inputs=torch.from_numpy(inputs.copy()), data_samples=int(self.photos.labels[i]))


def random_crop(photo: np.ndarray) -> np.ndarray:
    """A rectangle of a square photo (S, S, 3), of random area, aspect ratio and place."""
    side = len(photo)
    area, aspect = np.random.uniform(*AREA) * side**2, np.exp(np.random.uniform(*np.log(ASPECT)))
    height, width = (min(side, round(extent)) for extent in ((area / aspect) ** 0.5, (area * aspect) ** 0.5))
    top, left = np.random.randint(side - height + 1), np.random.randint(side - width + 1)
    return photo[top : top + height, left : left + width]
