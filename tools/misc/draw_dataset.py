"""Draw a small data set whose categories differ only in shape, in the layouts of COCO 2017 and ADE20K.

A scene is a textured background with 1 to 6 objects that partly cover each other. Colour, texture, size and rotation
are drawn without regard to the category, so that a model has to see the shape. The same seed writes the same bytes
(with the same NumPy and OpenCV), and a scene does not depend on how many others are drawn.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from swinv2_tools import ending  # isort: split

import argparse
import json
from tempfile import TemporaryDirectory

import cv2
import numpy as np
from pycocotools import mask as rle_codec
from swinv2_tools.progress import track

VERSION = '1'  # raise it when what is drawn changes, so that older data sets are recognised
SIZE = 256  # height and width of a scene in pixels
MAX_OBJECTS = 6
DIAMETERS = (60, 128)  # range of the circle around an object in pixels
MIN_VISIBLE_SHARE = 0.6  # of an object's area, and of its outline; less is hard to tell by eye
MIN_VISIBLE_PIXELS = 100
BACKGROUND, OBJECT = (10, 110), (110, 245)  # ranges of the colour channels: objects are the brighter ones
MIN_CONTRAST = 90  # summed over the three channels, between an object and what it covers
TRIES = 30  # placements tried for an object before it is left out
SPLITS = {'train': 'training', 'val': 'validation'}  # names in COCO and in ADE20K
JPEG_QUALITY = [cv2.IMWRITE_JPEG_QUALITY, 95]


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A pentagram: the points inside at least four of the five lines that its edges lie on."""
    angles = np.arange(5) * 2 * np.pi / 5
    return sum(u * np.cos(a) + v * np.sin(a) <= np.cos(2 * np.pi / 5) for a in angles) >= 4


# Each maps coordinates, in units of the radius of the circle around the shape, to whether they lie inside.
SHAPES = {
    'disc': lambda u, v: np.hypot(u, v) <= 1,
    'square': lambda u, v: np.maximum(abs(u), abs(v)) <= 0.7,
    'triangle': lambda u, v: (u >= -0.5) & (u + np.sqrt(3) * abs(v) <= 1),
    'star': _star,
    'cross': lambda u, v: (np.minimum(abs(u), abs(v)) <= 0.25) & (np.maximum(abs(u), abs(v)) <= 0.95),
    'ring': lambda u, v: abs(np.hypot(u, v) - 0.8) <= 0.2,
}
CATEGORIES = tuple(SHAPES)  # category ids, in COCO as in the label maps, count from 1 in this order


def rotated(angle: float, x: float, y: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of all pixels, two (SIZE, SIZE) in pixels, in a frame turned by ``angle`` with its origin at x, y."""
    dy, dx = np.arange(SIZE)[:, None] - y, np.arange(SIZE) - x
    return dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)


def draw_texture(rng: np.random.Generator, darkest: int, brightest: int) -> np.ndarray:
    """Draw a plain, graded, striped, checked or blotched surface of two related colours, with some grain.

    Args:
        rng (Generator): source of the randomness.
        darkest (int), brightest (int): range of the first colour's channels; the second is up to 30 away.

    Returns:
        ndarray: (SIZE, SIZE, 3), uint8.
    """
    angle, phase, period = rng.uniform((0, 0, 10), (2 * np.pi, 2 * np.pi, 40))
    along, across = rotated(angle, 0, 0)
    knots, kind = rng.random((12, 12)), rng.integers(5)

    def striped(distance):
        return np.sin(2 * np.pi * distance / period + phase) > 0

    mix = (  # (SIZE, SIZE); lambdas, so that only the chosen one is computed
        lambda: np.zeros((SIZE, SIZE)),
        lambda: (along - along.min()) / np.ptp(along),
        lambda: striped(along),
        lambda: striped(along) ^ striped(across),
        lambda: cv2.resize(knots, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC),
    )[kind]()

    colour, change = rng.uniform(darkest, brightest, 3), rng.uniform(-30, 30, 3)
    grain = rng.normal(0, rng.uniform(0, 8), (SIZE, SIZE))
    channels = [np.clip(first + step * mix + grain, 0, 255).astype(np.uint8) for first, step in zip(colour, change)]
    return np.stack(channels, axis=-1)


def draw_mask(rng: np.random.Generator, category: int) -> np.ndarray:
    """Rasterise one shape at a random size, rotation and place, wholly inside the scene.

    Args:
        rng (Generator): source of the randomness.
        category (int): category id, from 1.

    Returns:
        ndarray: (SIZE, SIZE), bool, the pixels whose centre lies inside.
    """
    radius = rng.uniform(*DIAMETERS) / 2
    u, v = rotated(rng.uniform(0, 2 * np.pi), *rng.uniform(radius, SIZE - 1 - radius, 2))
    return SHAPES[CATEGORIES[category - 1]](u / radius, v / radius)


def stands_out(image: np.ndarray, mask: np.ndarray, texture: np.ndarray) -> bool:
    """Whether 19 in 20 of the pixels that ``texture`` would paint inside ``mask`` differ clearly from ``image``."""
    contrast = np.abs(image[mask].astype(int) - texture[mask]).sum(axis=1)  # (pixels,)
    return np.quantile(contrast, 0.05) >= MIN_CONTRAST


def is_recognisable(whole: np.ndarray, visible: np.ndarray) -> bool:
    """Whether enough shows of an object, (SIZE, SIZE), bool.

    The outline counts besides the area: what shows through the hole of a ring alone could be any shape.
    """
    outline = whole & (cv2.erode(whole.astype(np.uint8), np.ones((3, 3))) == 0)
    enough_area = visible.sum() >= max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE * whole.sum())
    return enough_area and (outline & visible).sum() >= MIN_VISIBLE_SHARE * outline.sum()


def draw_scene(rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Draw a background and 1 to 6 objects, each over those before it.

    A placement that hides too much of an earlier object, or hardly differs from what it covers, is drawn again.

    Args:
        rng (Generator): source of all randomness.

    Returns:
        tuple: the image, (SIZE, SIZE, 3), uint8, BGR, and for each object its category id, from 1, and the mask of
        its visible pixels, (SIZE, SIZE), bool. The masks are disjoint and hold just the pixels that were painted.
    """
    image = draw_texture(rng, *BACKGROUND)
    drawn = []  # for each object, its category, its whole mask and the mask of its visible pixels
    for category in rng.integers(1, len(CATEGORIES) + 1, rng.integers(1, MAX_OBJECTS + 1)).tolist():
        for _ in range(TRIES):
            mask, texture = draw_mask(rng, category), draw_texture(rng, *OBJECT)
            covered = [(earlier, whole, visible & ~mask) for earlier, whole, visible in drawn]
            fits = all(is_recognisable(whole, visible) for _, whole, visible in covered)
            if fits and stands_out(image, mask, texture):
                image[mask] = texture[mask]
                drawn = [*covered, (category, mask, mask)]
                break
    return image, [(category, visible) for category, _, visible in drawn]


def describe(category: int, mask: np.ndarray) -> dict:
    """A COCO annotation without ids, of a (H, W) bool mask; ``bbox`` is x, y, width, height in pixels."""
    rle = rle_codec.encode(np.asfortranarray(mask, np.uint8))
    return {
        'category_id': category,
        'segmentation': {'size': rle['size'], 'counts': rle['counts'].decode('ascii')},
        'bbox': rle_codec.toBbox(rle).tolist(),
        'area': int(rle_codec.area(rle)),
        'iscrowd': 0,
    }


def write_split(root: Path, split: str, info: dict) -> None:
    """Draw the images of one split and write them, with their annotations, in both layouts.

    Args:
        root (Path): folder to write in.
        split (str): 'train' or 'val'.
        info (dict): parameters of the whole data set: its ``seed``, and the number of images under the split's name.
    """
    ade_split, number = SPLITS[split], list(SPLITS).index(split)
    folders = [root / name for name in (f'{split}2017', f'ade/images/{ade_split}', f'ade/annotations/{ade_split}')]
    for folder in (root / 'annotations', *folders):
        folder.mkdir(parents=True, exist_ok=True)
    coco_images, ade_images, ade_labels = folders
    images, annotations = [], []
    for image_id in track(range(1, info[split] + 1)):
        image, objects = draw_scene(np.random.default_rng([info['seed'], number, image_id]))
        name = f'{image_id:012d}'
        jpg = cv2.imencode('.jpg', image, JPEG_QUALITY)[1].tobytes()
        (coco_images / f'{name}.jpg').write_bytes(jpg)
        (ade_images / f'{name}.jpg').write_bytes(jpg)
        labels = sum(category * mask.astype(np.uint8) for category, mask in objects)  # (SIZE, SIZE), uint8
        (ade_labels / f'{name}.png').write_bytes(cv2.imencode('.png', labels)[1].tobytes())
        images.append({'id': image_id, 'file_name': f'{name}.jpg', 'height': SIZE, 'width': SIZE})
        for category, mask in objects:
            annotations.append({'id': len(annotations) + 1, 'image_id': image_id, **describe(category, mask)})

    categories = [{'id': i, 'name': name, 'supercategory': 'shape'} for i, name in enumerate(CATEGORIES, 1)]
    coco = {'info': info, 'licenses': [], 'images': images, 'annotations': annotations, 'categories': categories}
    (root / 'annotations' / f'instances_{split}2017.json').write_text(json.dumps(coco))


def read_split(out: Path, split: str) -> dict:
    """The COCO annotations of one split; {} if there are none that can be read."""
    try:
        coco = json.loads((out / 'annotations' / f'instances_{split}2017.json').read_text())
    except (OSError, ValueError):
        return {}
    return coco if isinstance(coco, dict) else {}


def write_dataset(out: str | Path, train: int, val: int, seed: int) -> bool:
    """Write the data set as a whole or not at all: it is drawn in ``.draw_dataset_*`` beside ``out``, then renamed.

    Args:
        out (str or Path): folder to create.
        train (int), val (int): number of images in each split.
        seed (int): seed of all randomness.

    Returns:
        bool: False if ``out`` already was this data set, as the info of its annotations says, and was left alone.

    Raises:
        ValueError: if a count or the seed is negative.
        FileExistsError: if ``out`` exists and is anything else.
    """
    for name, value in {'train': train, 'val': val, 'seed': seed}.items():
        if value < 0:
            raise ValueError(f'{name} is {value}, but must be 0 or more')
    out = Path(out).resolve()
    info = {'description': 'drawn shapes', 'version': VERSION, 'train': train, 'val': val, 'seed': seed}
    if all(read_split(out, split).get('info') == info for split in SPLITS):
        return False
    if out.exists():
        raise FileExistsError(f'{out} exists and is not the data set asked for: remove it or name another folder')
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix='.draw_dataset_', dir=out.parent) as tmp:
        root = Path(tmp) / 'data'
        for split in SPLITS:
            write_split(root, split, info)
        root.rename(out)
    return True


def summary(out: Path) -> str:
    """How many images and objects of each category a written data set has, a line for each split."""
    lines = []
    for split in SPLITS:
        coco = read_split(out, split)
        ids = [annotation['category_id'] for annotation in coco['annotations']]
        counts = ', '.join(f'{name} {ids.count(i)}' for i, name in enumerate(CATEGORIES, 1))
        lines.append(f'{split}: {len(coco["images"])} images, {len(ids)} objects ({counts})')
    return '\n'.join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description='Draw a small data set of shapes in the layouts of COCO 2017 and ADE20K.',
        epilog='example: python tools/misc/draw_dataset.py data/my_shapes --train 200 --val 50',
    )
    parser.add_argument(
        'out', type=Path, help='folder to create, in the layout of COCO; its subfolder ade has that of ADE20K'
    )
    parser.add_argument('--train', type=int, default=200, help='training images (default: %(default)s)')
    parser.add_argument('--val', type=int, default=50, help='validation images (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='the same seed draws the same data (default: %(default)s)')
    args = parser.parse_args()
    try:
        drawn = write_dataset(args.out, args.train, args.val, args.seed)
    except (OSError, ValueError) as error:
        print(f'{parser.prog}: error: {error}', file=sys.stderr)
        return 2
    print(f'wrote {args.out}' if drawn else f'{args.out} already holds this data set')
    print(summary(args.out))
    return 0


if __name__ == '__main__':
    sys.exit(ending.run(main))
