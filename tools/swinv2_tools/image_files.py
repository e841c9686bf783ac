"""Find image files, and name the files that are made from them."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

EXTENSIONS = ('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
MAX_STEM = 250  # bytes: file systems take names of 255, with the extension


def find_images(inputs: Sequence[str], results: Sequence[str] = ()) -> dict[str, Path]:
    """Find images.

    Args:
        inputs (Sequence[str]): files, folders and patterns.
        results (Sequence[str]): folders of pictures that an earlier run wrote, which are left out.

    Returns:
        dict: paths by name, in the order of the names. A name is the path relative to the folder of all inputs.

    Raises:
        ValueError: there is none under one of the inputs.
    """
    found, roots = set(), set()
    for given in inputs:
        if os.path.isfile(given):
            paths = [given]  # whatever its extension
        else:
            pattern = os.path.join(glob.escape(given), '**') if os.path.isdir(given) else given
            paths = [path for path in expand(pattern) if is_image(path, results)]
        if not paths:
            raise ValueError(
                f'no image at {given}: no such file, and no file there that ends in {", ".join(EXTENSIONS)}'
            )
        paths = [os.path.abspath(path) for path in paths]
        found.update(paths)
        roots.update([os.path.abspath(given)] if os.path.isdir(given) else map(os.path.dirname, paths))
    root = os.path.commonpath(roots)
    return {name: Path(root, name) for name in sorted(os.path.relpath(path, root) for path in found)}


def expand(pattern: str) -> list[str]:
    """The paths that match a pattern, as by a recursive `glob`, but ``**`` reads each folder once."""
    match = re.fullmatch(r'((?:.*?/)?)\*\*(?:/+(.*))?', pattern, re.DOTALL)
    if not match:
        return glob.glob(pattern)
    head, tail = match[1], match[2] or '*'
    tops = glob.glob(head) if head else ['']
    return [path for top in tops for folder in folders(top) for path in expand(os.path.join(glob.escape(folder), tail))]


def folders(top: str) -> Iterator[str]:
    """A folder and all below it that are not hidden, each once. Those that only links lead to come last."""
    seen, tops = set(), [top or '.']
    for start in tops:  # grows
        for folder, below, _ in os.walk(start):
            real = os.path.realpath(folder)
            if real in seen:
                below.clear()
                continue
            seen.add(real)
            below[:] = [name for name in sorted(below) if name[0] != '.']
            tops += filter(os.path.islink, (os.path.join(folder, name) for name in below))
            yield folder


def is_image(path: str, results: Sequence[str]) -> bool:
    """Whether the path is of a file that looks like an image and lies in none of the folders ``results``."""
    is_named_so = path.lower().endswith(EXTENSIONS) and os.path.isfile(path)
    return is_named_so and not {Path(folder).resolve() for folder in results} & {*Path(path).resolve().parents}


def relative_names(paths: Iterable[str]) -> dict[str, str]:
    """Names of images by path: the path relative to the folder of all of them."""
    absolute = {path: os.path.abspath(path) for path in paths}
    root = os.path.commonpath({os.path.dirname(path) for path in absolute.values()}) if absolute else ''
    return {path: os.path.relpath(name, root) for path, name in absolute.items()}


def output_stems(names: Iterable[str]) -> dict[str, str]:
    """Names of outputs without extension. An image keeps its extension if two images differ only in that."""
    stems = {name: os.path.splitext(name)[0] for name in names}
    counts = Counter([*stems.values(), *stems])  # a.jpg.png must not take what a.jpg gets beside a.png
    return {name: shorten(stem if counts[stem] == 1 else name) for name, stem in stems.items()}


def picture_extension(name: str) -> str:
    """The extension of a picture drawn of an image: that of a JPEG stays, all else becomes PNG."""
    extension = os.path.splitext(name)[1]
    return extension if extension.lower() in ('.jpg', '.jpeg') else '.png'


def shorten(stem: str) -> str:
    """Cut the last part of a path if it is too long for a file system, and add a hash that keeps it unique."""
    folder, name = os.path.split(stem)
    if len(os.fsencode(name)) <= MAX_STEM:
        return stem
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    cut = os.fsencode(name)[: MAX_STEM - 17].decode(errors='ignore')  # drops half a character
    return os.path.join(folder, f'{cut}-{digest}')
