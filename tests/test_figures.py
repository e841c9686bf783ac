"""The figures of the README: what they show is what the package, the table and the demo say."""

import importlib.util
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swinv2_mm.windows import partition

ROOT = Path(__file__).parents[1]
GALLERY = ('gallery_bias', 'gallery_curves', 'gallery_detector', 'gallery_segmentor')
MAPS = [(25, 42, 16, 0), (25, 42, 16, 8), (17, 16, 8, 4), (9, 30, 4, 2), (9, 30, 4, 0)]


@pytest.fixture(scope='module')
def figures():
    """``docs/draw_figures.py`` as a module."""
    spec = importlib.util.spec_from_file_location('draw_figures', ROOT / 'docs/draw_figures.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # NamedTuple looks its annotations up there
    spec.loader.exec_module(module)
    return module


def alike(*keys):
    """The sets of places that have the same keys."""
    places = defaultdict(set)
    for place, key in enumerate(zip(*(array.ravel().tolist() for array in keys))):
        places[key].add(place)
    return set(map(frozenset, places.values()))


@pytest.mark.parametrize('case', MAPS)
def test_ragged_windows_are_those_of_the_package(case, figures):
    windows = partition(1, *case)
    places, expected = windows.order.tolist(), set()
    for group in windows.groups:
        for _ in range(group.count):
            window, places = places[: group.height * group.width], places[group.height * group.width :]
            expected.add(frozenset(window))
    drawn = figures.ragged_windows(*case)
    assert drawn.shape == case[:2]
    assert sum(map(len, expected)) == drawn.size == len(set().union(*expected))  # every token once
    assert alike(drawn) == expected


@pytest.mark.parametrize('case', MAPS)
def test_padded_windows_hold_the_same_tokens_beside_padding(case, figures):
    tokens, windows, regions = figures.padded_windows(*case)
    height, width, window, _ = case
    assert tokens.shape == (height + -height % window, width + -width % window)
    assert np.unique(windows, return_counts=True)[1].tolist() == [window**2] * (windows.max() + 1)
    tokens = tokens.ravel()
    real = tokens != figures.PADDING
    assert sorted(tokens[real]) == list(range(height * width))
    together = {frozenset(tokens[list(places)]) - {figures.PADDING} for places in alike(windows, regions)}
    assert together - {frozenset()} == alike(figures.ragged_windows(*case))


def test_the_figure_of_windows_shows_each_token_in_its_colour(figures):
    unshifted, shifted, padded = figures.draw_windows().axes
    height, width = 25, 42  # of an image of 800 x 1333, at stride 32
    for axes, shift in ((unshifted, 0), (shifted, 8)):
        colours = np.asarray(axes.images[0].get_array())
        assert colours.shape == (height, width, 3)
        assert axes.get_title(loc='left').endswith('\n1,050 tokens')
        windows = partition(1, height, width, 16, shift)
        rows = colours.reshape(-1, 3)[windows.order.numpy()]
        sizes = [group.height * group.width for group in windows.groups for _ in range(group.count)]
        parts = np.split(rows, np.cumsum(sizes)[:-1])
        assert all((part == part[0]).all() for part in parts)
        assert len({tuple(part[0]) for part in parts}) == len(parts)  # each window has a colour of its own
    drawn = np.asarray(padded.images[0].get_array())
    assert drawn.shape == (32, 48, 3)
    assert padded.get_title(loc='left').endswith('\n1,536 tokens, 46% more')
    rolled = np.roll(drawn, (8, 8), (0, 1))
    np.testing.assert_array_equal(rolled[:height, :width], colours)
    hatched = {(int(patch.get_y()), int(patch.get_x())) for patch in padded.patches if patch.get_hatch()}
    is_padding = np.ones((32, 48), bool)
    is_padding[:height, :width] = False
    assert hatched == set(map(tuple, np.argwhere(np.roll(is_padding, (-8, -8), (0, 1))).tolist()))
    assert not any(patch.get_hatch() for axes in (unshifted, shifted) for patch in axes.patches)


def test_bars_are_as_long_as_the_table_says(figures):
    page = figures.PERFORMANCE.read_text()
    time, memory = figures.draw_speed(page).axes
    said = re.findall(r'\*\*([\d.]+)x\*\* \| \*\*([\d.]+)x\*\* \| \d+%', page)[:5]  # the ratios in the table itself
    faster, share = np.array(said, float).T
    for axes, ratio in ((time, 1 / faster), (memory, share)):
        ours, peers = ([patch.get_width() for patch in axes.patches[i::2]] for i in (0, 1))
        assert peers == [1] * 5
        np.testing.assert_allclose(ours, ratio, rtol=0.006, atol=0.005)  # both sides are rounded in the table
    for figure in (
        '1.55 s',
        'timm, 3.40 s',
        '2.73 s',
        'mmpretrain, 2.74 GB',
        '2.43 GB',
        'Two cores of an AMD EPYC, no GPU.',
    ):
        assert figure in figures.texts(time.figure)


def test_the_readme_sums_up_the_table(figures):
    rows = figures.read_measured(figures.PERFORMANCE.read_text())
    faster = [figures.best_peer(row.seconds)[1] / row.seconds['swinv2_mm'] for row in rows]
    share = [row.memory['swinv2_mm'] / figures.best_peer(row.memory)[1] for row in rows]
    readme = ' '.join((ROOT / 'README.md').read_text().split())
    assert f'{min(faster):.1f} to {max(faster):.1f} times as fast as the fastest peer' in readme
    assert f'{min(share):.0%} to {max(share):.0%} of the memory of the leanest' in readme


@pytest.mark.parametrize('name', ['windows', 'speed'])
def test_the_figures_in_the_repository_are_drawn_anew_when_their_data_change(name, figures):
    drawn = figures.draw_windows() if name == 'windows' else figures.draw_speed(figures.PERFORMANCE.read_text())
    with Image.open(ROOT / f'docs/figures/{name}.png') as image:
        assert image.text['Description'] == figures.texts(drawn), 'run python docs/draw_figures.py'


def test_figures_are_small():
    sizes = {path.name: path.stat().st_size for path in (ROOT / 'docs/figures').iterdir()}
    assert {'windows.png', 'speed.png', 'demo.png', *(f'{name}.png' for name in GALLERY)} <= set(sizes)
    assert all(size < 150_000 for size in sizes.values()), sizes


@pytest.fixture
def demo(figures, tmp_path):
    """A folder as a demo leaves it, in which each picture has a colour of its own, and the colours of the scenes."""
    colours = {name: [(40 * i, 20 * i, 200 - 30 * j) for i in range(7)] for j, name in enumerate(figures.MODELS)}
    for name, of_scenes in colours.items():
        folder = tmp_path / 'seed_0/transferred' / name
        (folder / 'predictions/overlays').mkdir(parents=True)
        (folder / 'pictures').mkdir()
        for i, colour in enumerate(of_scenes):
            image = Image.new('RGB', (64, 48), colour)
            image.save(folder / f'predictions/overlays/{i}.jpg', quality=100)
            pair = np.hstack([np.asarray(image), 255 - np.asarray(image)])  # ground truth, prediction
            Image.fromarray(pair).save(folder / f'pictures/{i}.png')
            Image.fromarray(pair).save(folder / 'pictures/100.png')  # of a scene that the demo does not draw
        Image.new('RGBA', (90, 30), colour).save(folder / 'curves.png')
    Image.new('RGBA', (80, 40), (1, 2, 3)).save(tmp_path / 'seed_0/position_bias.png')
    return tmp_path / 'seed_0', colours


def test_figures_of_the_demo_come_from_its_folder(figures, demo, tmp_path, monkeypatch):
    folder, colours = demo
    monkeypatch.setattr(sys, 'argv', ['draw', '--demo', str(folder), '--out', str(tmp_path / 'out')])
    assert figures.main() == 0
    names = {path.stem for path in (tmp_path / 'out').iterdir()}
    assert names == {'demo', 'speed', 'windows', *GALLERY}
    pixels = {name: np.asarray(Image.open(tmp_path / f'out/{name}.png').convert('RGB'), int) for name in names}

    def is_shown(name, row, column, colour):
        shown = pixels[name][52 * row + 26, figures.LABEL + 68 * column + 34]
        return abs(shown - colour).max() <= 3

    for name in ('demo', 'gallery_detector', 'gallery_segmentor'):
        assert pixels[name].shape == (2 * 52, figures.LABEL + 4 * 68, 3)
    kinds = zip(colours.values(), ('gallery_detector', 'gallery_segmentor'))
    for row, (of_scenes, gallery) in enumerate(kinds):
        for column, scene in enumerate((0, 2, 4, 6)):  # from the first to the last
            assert is_shown('demo', row, column, of_scenes[scene])
            assert is_shown(gallery, 0, column, of_scenes[scene])
            assert is_shown(gallery, 1, column, 255 - np.array(of_scenes[scene]))
    assert (pixels['gallery_bias'] == (1, 2, 3)).all() and pixels['gallery_bias'].shape == (40, 80, 3)
    curves = [np.full((30, 90, 3), of_scenes[-1]) for of_scenes in colours.values()]
    np.testing.assert_allclose(pixels['gallery_curves'], np.vstack(curves), atol=3)


def test_a_demo_without_pictures_is_one_line(figures, demo, tmp_path, monkeypatch, capsys):
    folder, _ = demo
    (folder / 'transferred/upernet/pictures/4.png').unlink()
    monkeypatch.setattr(sys, 'argv', ['draw', '--demo', str(folder), '--out', str(tmp_path / 'out')])
    assert figures.main() == 2
    pictures = folder / 'transferred/upernet/pictures'
    expected = f'error: {pictures} lacks some scenes: run tools/test.py with --show-dir {pictures}\n'
    assert capsys.readouterr().err == expected
    assert not (tmp_path / 'out').exists()


def test_an_unfinished_demo_is_one_line(figures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['draw', '--demo', str(tmp_path), '--out', str(tmp_path / 'out')])
    assert figures.main() == 2
    assert capsys.readouterr().err == (
        f'error: {tmp_path} has 0 overlays of mask_rcnn, not 4: run tools/demo.py to its end\n'
    )
    assert not (tmp_path / 'out').exists()


def test_a_page_without_its_table_is_an_error(figures):
    with pytest.raises(ValueError, match='no table with a column swinv2_mm'):
        figures.draw_speed('| Task | time |\n|---|---|\n| inference | 1 s |\n')
