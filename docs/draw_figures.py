"""Draw the figures of the README and the gallery: windows, speed and memory, and what a finished demo shows.

Windows come from the package, speed and memory from docs/performance.md, all else from the folder of the demo, in
which tools/test.py has left pictures, as docs/gallery.md says. No figure holds a measured number of its own.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Text
from PIL import Image
from PIL.PngImagePlugin import PngInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package of this clone, whether or not one is installed

from swinv2_mm.windows import axis_segments, partition  # noqa: E402

INK, OURS, PEER, PADDED, HATCH = '#1f2933', '#2f80ed', '#b4bcc8', '#f2f2f2', '#8a94a3'
COLUMN_COLOURS, ROW_TINTS = ('#2f80ed', '#f2994a', '#27ae60', '#d6409f'), (0.45, 0.75, 0.25)
DASHED = (0, (2, 2))
TEXT = {'fontsize': 11, 'color': INK}
DPI, NUM_COLOURS = 160, 128

IMAGE, STRIDE, WINDOW = (800, 1333), 32, 16  # the last map of the usual detection image, at the usual window
PADDING = -1  # stands in for a token
PERFORMANCE = ROOT / 'docs/performance.md'
UNITS = {'ms': 1e-3, 's': 1, 'MB': 1e6, 'GB': 1e9}
MODELS = {'mask_rcnn': 'Mask R-CNN', 'upernet': 'UPerNet'}  # by their folder in a run of the demo
SCENES = 4  # of those that the demo draws
LABEL, GAP = 40, ((2, 2), (2, 2), (0, 0))  # pixels


class Panel(NamedTuple):
    """What one panel of the figure of windows shows, every field for each token of its map.

    Attributes:
        colours (ndarray): (H, W, 3), in 0 to 1.
        windows (ndarray): (H, W), numbers. Solid lines surround windows.
        regions (ndarray): (H, W), numbers. Dashed lines surround regions.
        padding (ndarray): (H, W), bool. Padding is hatched.
    """

    colours: np.ndarray
    windows: np.ndarray
    regions: np.ndarray
    padding: np.ndarray


def ragged_windows(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """The number of each token's ragged window, (H, W), in the order in which `partition` lists them."""
    windows = partition(1, height, width, window, shift)
    sizes = [group.height * group.width for group in windows.groups for _ in range(group.count)]
    numbers = np.empty(height * width, int)
    numbers[windows.order.numpy()] = np.repeat(np.arange(len(sizes)), sizes)
    return numbers.reshape(height, width)


def padded_windows(height: int, width: int, window: int, shift: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pad, roll, cut and mask a map that is larger than a window along both axes.

    Regions follow `models/swin_transformer_v2.py` of the official code, padding follows
    `Swin-Transformer-Object-Detection`.

    Returns:
        tuple[ndarray]: for each place of the padded map, (H', W'), the flat index of its token or `PADDING`, the number
        of its window, and that of its region. The mask lets a token attend to its own region alone.
    """
    tokens = np.arange(height * width).reshape(height, width)
    tokens = np.pad(tokens, [(0, -size % window) for size in tokens.shape], constant_values=PADDING)
    tokens = np.roll(tokens, (-shift, -shift), (0, 1))
    row, column = np.indices(tokens.shape)
    regions = np.zeros_like(tokens)
    if shift:
        for place, size in zip((row, column), tokens.shape):
            regions = 3 * regions + (place >= size - window) + (place >= size - shift)
    return tokens, row // window * (tokens.shape[1] // window) + column // window, regions


def window_colours(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """A colour for each token, (H, W, 3): one for each ragged window, by its column, paler or darker by its row."""

    def segments(length):
        starts = sorted(start for starts in axis_segments(length, window, shift).values() for start in starts)
        return np.searchsorted(starts, np.arange(length), side='right') - 1

    colour = np.array([to_rgb(name) for name in COLUMN_COLOURS])[segments(width) % len(COLUMN_COLOURS)]  # (W, 3)
    tint = np.array(ROW_TINTS)[segments(height) % len(ROW_TINTS), None, None]  # (H, 1, 1)
    return 1 - tint * (1 - colour)


def ragged_panel(height: int, width: int, window: int, shift: int) -> Panel:
    """The ragged windows of this package."""
    none = np.zeros((height, width), bool)
    windows = ragged_windows(height, width, window, shift)
    return Panel(window_colours(height, width, window, shift), windows, none.astype(int), none)


def padded_panel(height: int, width: int, window: int, shift: int) -> Panel:
    """The windows of other ports. Each token keeps the colour that it has in `ragged_panel`."""
    tokens, windows, regions = padded_windows(height, width, window, shift)
    padding = tokens == PADDING
    colours = window_colours(height, width, window, shift).reshape(-1, 3)[tokens]
    return Panel(np.where(padding[..., None], to_rgb(PADDED), colours), windows, regions, padding)


def borders(numbers: np.ndarray) -> list:
    """The unit lines, ((x, y), (x, y)), between neighbours of an (H, W) array that differ."""
    down, right = (np.argwhere(np.diff(numbers, axis=axis)) for axis in (0, 1))
    return [((x, y + 1), (x + 1, y + 1)) for y, x in down] + [((x + 1, y), (x + 1, y + 1)) for y, x in right]


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw the tokens of a map as cells of size 1."""
    height, width = panel.windows.shape
    axes.imshow(panel.colours, extent=(0, width, height, 0), interpolation='nearest')
    axes.hlines(range(1, height), 0, width, colors='white', linewidths=0.4)
    axes.vlines(range(1, width), 0, height, colors='white', linewidths=0.4)
    for y, x in np.argwhere(panel.padding):
        axes.add_patch(Rectangle((x, y), 1, 1, fill=False, hatch='//////', linewidth=0, edgecolor=HATCH))
    axes.add_collection(LineCollection(borders(panel.regions), colors=INK, linewidths=1, linestyles=DASHED))
    axes.add_collection(LineCollection(borders(panel.windows), colors=INK, linewidths=1.8, capstyle='projecting'))
    axes.add_patch(Rectangle((0, 0), width, height, fill=False, edgecolor=INK, linewidth=1.8, clip_on=False))
    axes.set_axis_off()
    axes.set(xticks=[], yticks=[])


def draw_windows() -> Figure:
    """Draw ragged windows, unshifted and shifted, beside the padded, rolled and masked windows of other ports."""
    height, width = (-(-side // STRIDE) for side in IMAGE)
    shift = WINDOW // 2
    padded = padded_panel(height, width, WINDOW, shift)
    ours, theirs = height * width, padded.padding.size
    panels = {
        f'ours: ragged windows\n{ours:,} tokens': ragged_panel(height, width, WINDOW, 0),
        f'ours: ragged windows, shifted\n{ours:,} tokens': ragged_panel(height, width, WINDOW, shift),
        f'other ports: padded, rolled, masked\n{theirs:,} tokens, {theirs / ours - 1:.0%} more': padded,
    }
    figure = _side_by_side(panels)
    note = (
        f'Last map of an {IMAGE[0]}x{IMAGE[1]} image: {height} x {width} tokens, window {WINDOW}.\n'
        'One colour: tokens that attend to each other (other ports: to padding too).'
    )
    figure.text(0.005, 0.185, note, va='center', linespacing=1.4, **TEXT)
    key = [
        Patch(facecolor=ROW_TINTS[0] * np.array(to_rgb(OURS)) + 1 - ROW_TINTS[0], edgecolor=INK, label='window'),
        Patch(facecolor='white', edgecolor=INK, linestyle=DASHED, label='mask'),
        Patch(facecolor=PADDED, edgecolor=HATCH, hatch='//////', label='padding'),
    ]
    figure.legend(handles=key, loc='lower left', ncols=3, frameon=False, fontsize=11, borderaxespad=0.2)
    return figure


def _side_by_side(panels):
    """A figure with panels in a row, their tokens of one size, and room for titles above and a key below."""
    sizes = [panel.windows.shape for panel in panels.values()]
    token = 9.5 / sum(width for _, width in sizes)  # inches
    total = np.array((10, 1.05 + token * max(height for height, _ in sizes)))
    figure, left = Figure(dpi=DPI, figsize=tuple(total)), 0.05
    for (title, panel), (height, width) in zip(panels.items(), sizes):
        place = np.array((left, total[1] - 0.6 - token * height, token * width, token * height))
        axes = figure.add_axes(tuple(place / np.tile(total, 2)))
        draw_panel(axes, panel)
        axes.set_title(title, fontsize=12, color=INK, loc='left', linespacing=1.3)
        left += token * width + 0.2
    return figure


class Measured(NamedTuple):
    """A row of the table: what was run, and of each implementation the seconds and the bytes."""

    work: str
    seconds: dict[str, float]
    memory: dict[str, float]


def read_measured(page: str) -> list[Measured]:
    """The first table of a page that has a column for swinv2_mm, whose cells are like ``1.55 s, 426 MB``.

    Raises:
        ValueError: there is no such table.
    """
    table = re.search(r'^(\|[^\n|]*\| swinv2_mm \|[^\n]*)\n\|[-|]+\n((?:\|.*\n)+)', page, re.MULTILINE)
    if not table:
        raise ValueError(f'no table with a column swinv2_mm: put it back into {PERFORMANCE}')
    _, *names = _cells(table[1])
    rows = []
    for line in table[2].splitlines():
        work, *cells = _cells(line)
        pairs = {name: re.findall(r'([\d.]+) (ms|s|MB|GB)\b', cell) for name, cell in zip(names, cells)}
        values = {name: [float(number) * UNITS[unit] for number, unit in pair] for name, pair in pairs.items() if pair}
        rows.append(Measured(work, *({name: value[i] for name, value in values.items()} for i in (0, 1))))
    return rows


def _cells(line):
    return [cell.strip() for cell in line.strip('|\n').split('|')]


def read_bullet(page: str, name: str) -> str:
    """The first sentence of the item ``- **name:** ...`` of a page.

    Raises:
        ValueError: there is none.
    """
    item = re.search(rf'^- \*\*{name}:\*\* (.*?\.)\s', page, re.MULTILINE | re.DOTALL)
    if not item:
        raise ValueError(f'no item {name!r}: put it back into {PERFORMANCE}')
    return ' '.join(item[1].split())


def best_peer(by_name: dict[str, float]) -> tuple[str, float]:
    """The implementation other than ours that needs least, and what it needs."""
    return min(((name, value) for name, value in by_name.items() if name != 'swinv2_mm'), key=itemgetter(1))


def draw_speed(page: str) -> Figure:
    """Draw time and memory of each row of the table beside those of the fastest and of the leanest peer."""
    rows = read_measured(page)
    figure = Figure(dpi=DPI, figsize=(10, 0.85 + 0.62 * len(rows)))
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={'wspace': 0.06})
    draw_bars(left, 'time', [row.seconds for row in rows], lambda ours, peer: f'{peer / ours:.1f}x faster')
    draw_bars(right, 'peak memory', [row.memory for row in rows], lambda ours, peer: f'{ours / peer:.2f}x')
    left.set_yticks(range(len(rows)), [row.work.replace(', ', ',\n') for row in rows], **TEXT)
    figure.subplots_adjust(left=0.2, right=0.995, top=1 - 0.45 / figure.get_figheight(), bottom=0.1)
    key = [Patch(color=OURS, label='swinv2_mm'), Patch(color=PEER, label='best peer')]
    figure.legend(handles=key, loc='upper left', frameon=False, fontsize=11, borderaxespad=0)
    figure.text(0.008, 0.025, f'{read_bullet(page, "Model")} {read_bullet(page, "Hardware")}', fontsize=10, color=INK)
    return figure


def draw_bars(axes: Axes, title: str, values: list[dict[str, float]], compare: Callable[[float, float], str]) -> None:
    """Draw two bars for each row: the peer with the least, as long as that of any other row, and ours in proportion.

    Args:
        axes (Axes): where to draw.
        title (str): what the values are.
        values (list[dict]): for each row, seconds or bytes by implementation.
        compare (Callable): what to say of our value and the peer's.
    """
    for place, by_name in enumerate(values):
        ours = by_name['swinv2_mm']
        peer, least = best_peer(by_name)
        axes.barh([place - 0.19, place + 0.19], [ours / least, 1], 0.36, color=[OURS, PEER])
        ratio = compare(ours, least).replace(' ', r'\ ')
        axes.text(ours / least + 0.01, place - 0.19, rf'{_with_unit(ours)}, $\bf{{{ratio}}}$', va='center', **TEXT)
        axes.text(0.99, place + 0.19, f'{peer}, {_with_unit(least)}', va='center', ha='right', **TEXT)
    axes.set_title(title, fontsize=12, color=INK, loc='left')
    axes.set(xlim=(0, 1.2), ylim=(len(values) - 0.5, -0.5), xticks=[])
    axes.spines[['top', 'right', 'bottom']].set_visible(False)
    axes.tick_params(length=0)


def _with_unit(value):
    """Seconds, or more than a thousand bytes."""
    if value < 1000:
        return f'{value:.2f} s'
    return f'{value / 1e9:.2f} GB' if value >= 1e9 else f'{value / 1e6:.0f} MB'


def draw_demo(folder: Path) -> Figure:
    """Draw what both models of a finished demo found in the same scenes: a row for each model.

    Args:
        folder (Path): of one seed, such as ``work_dirs/demo/seed_0``.

    Raises:
        ValueError: there are fewer scenes than the figure shows.
    """
    return draw_rows({label: [_read(path) for path in _overlays(folder, name)] for name, label in MODELS.items()})


def draw_gallery(folder: Path, name: str) -> Figure:
    """Draw the ground truth of these scenes, and below it what one of the models found.

    Args:
        folder (Path): of one seed.
        name (str): of the model, a key of `MODELS`.

    Raises:
        ValueError: there are no pictures of these scenes.
    """
    pictures = folder / 'transferred' / name / 'pictures'
    found = [next(pictures.glob(f'{path.stem}.*'), None) for path in _overlays(folder, name)]
    if None in found:
        raise ValueError(f'{pictures} lacks some scenes: run tools/test.py with --show-dir {pictures}')
    truth, predicted = zip(*(np.hsplit(_read(path), 2) for path in found))
    return draw_rows({'ground truth': truth, MODELS[name]: predicted})


def draw_rows(rows: dict[str, Sequence[np.ndarray]]) -> Figure:
    """Draw rows of pictures (H, W, 3) of one size, each with a label on its left."""
    tiles = [np.concatenate([np.pad(tile, GAP, constant_values=255) for tile in row], axis=1) for row in rows.values()]
    figure = draw_pictures(tiles, LABEL)
    for i, label in enumerate(rows):
        x, y = 0.5 * LABEL / (figure.get_figwidth() * DPI), 1 - (i + 0.5) / len(rows)
        figure.text(x, y, label, rotation=90, ha='center', va='center', **TEXT)
    return figure


def draw_pictures(pictures: Sequence[np.ndarray], left: int = 0) -> Figure:
    """Draw pictures (H, W, 3) of one width below each other, pixel by pixel, with some room on the left."""
    stacked = np.concatenate(pictures)
    height, width, _ = stacked.shape
    figure = Figure(figsize=((left + width) / DPI, height / DPI), dpi=DPI)
    figure.figimage(stacked, xo=left)
    return figure


def _overlays(folder, name):
    overlays = sorted((folder / 'transferred' / name / 'predictions/overlays').glob('*.jpg'))
    if len(overlays) < SCENES:
        raise ValueError(f'{folder} has {len(overlays)} overlays of {name}, not {SCENES}: run tools/demo.py to its end')
    return [overlays[i * (len(overlays) - 1) // (SCENES - 1)] for i in range(SCENES)]


def _read(path):
    return np.asarray(Image.open(path).convert('RGB'))


def draw_of_demo(folder: Path) -> dict[str, Figure]:
    """All figures of a finished demo, by name.

    Args:
        folder (Path): of one seed.
    """
    return {
        'demo': draw_demo(folder),
        'gallery_detector': draw_gallery(folder, 'mask_rcnn'),
        'gallery_segmentor': draw_gallery(folder, 'upernet'),
        'gallery_bias': draw_pictures([_read(folder / 'position_bias.png')]),
        'gallery_curves': draw_pictures([_read(folder / 'transferred' / name / 'curves.png') for name in MODELS]),
    }


def texts(figure: Figure) -> str:
    """All that a figure says, in alphabetical order."""
    figure.draw_without_rendering()  # makes the labels of its ticks
    return '\n'.join(sorted({text.get_text() for text in figure.findobj(Text)} - {''}))


def save(figure: Figure, path: Path) -> None:
    """Write a PNG with a palette, which keeps it small, and with the texts of the figure as its description."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert('RGB')
    image = image.quantize(NUM_COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=1)
    described = PngInfo()
    described.add_text('Description', texts(figure))
    image.save(path, optimize=True, pnginfo=described)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='example: python docs/draw_figures.py --demo work_dirs/demo/seed_0'
    )
    parser.add_argument('--demo', type=Path, help='folder of one seed of a finished demo (default: leave its figures)')
    parser.add_argument('--out', type=Path, default=ROOT / 'docs/figures', help='folder (default: docs/figures)')
    return parser.parse_args(argv)


def main() -> int:
    args = parse_args()
    try:
        figures = draw_of_demo(args.demo) if args.demo else {}
        figures.update(windows=draw_windows(), speed=draw_speed(PERFORMANCE.read_text()))
        args.out.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            save(figure, args.out / f'{name}.png')
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
