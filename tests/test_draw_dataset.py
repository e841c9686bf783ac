import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

TOOL = Path(__file__).parents[1] / 'tools' / 'misc' / 'draw_dataset.py'
SPEC = importlib.util.spec_from_file_location('draw_dataset', TOOL)
draw_dataset = importlib.util.module_from_spec(SPEC)
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(TOOL.parents[1])  # it imports swinv2_tools/
    SPEC.loader.exec_module(draw_dataset)
CATEGORIES, SIZE = draw_dataset.CATEGORIES, draw_dataset.SIZE
IDS = range(1, len(CATEGORIES) + 1)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def run(*args):
    return subprocess.run([sys.executable, TOOL, *map(str, args)], capture_output=True, text=True)


@pytest.fixture(scope='module')
def scenes():
    return [draw_dataset.draw_scene(np.random.default_rng(i)) for i in range(60)]


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp('data') / 'shapes'
    assert draw_dataset.write_dataset(out, train=6, val=2, seed=3)
    return out


def test_scenes_hold_1_to_6_disjoint_objects_of_every_category(scenes):
    for image, objects in scenes:
        masks = [mask for _, mask in objects]
        assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
        assert 1 <= len(objects) <= 6
        assert np.sum(masks, axis=0).max() == 1
        assert min(mask.sum() for mask in masks) >= 100
    assert {len(objects) for _, objects in scenes} == {1, 2, 3, 4, 5, 6}
    assert {category for _, objects in scenes for category, _ in objects} == set(IDS)


def test_objects_cover_each_other(scenes):
    def touch(a, b):
        return (cv2.dilate(a.astype(np.uint8), np.ones((3, 3))) * b).sum() > 10

    pairs = [itertools.combinations([mask for _, mask in objects], 2) for _, objects in scenes]
    assert sum(any(touch(a, b) for a, b in scene) for scene in pairs) > len(scenes) / 4


def test_image_changes_at_the_mask_boundary_and_nowhere_beside_it(scenes):
    """Colours jump between the last pixel inside and the first outside, but not two pixels further in or out."""

    def jump(image, inside):
        step = np.abs(np.diff(image.astype(int), axis=1)).sum(axis=2)
        return np.median(step[inside[:, 1:] != inside[:, :-1]])

    at, inwards, outwards = [], [], []
    for image, objects in scenes:
        for _, mask in objects:
            mask, kernel = mask.astype(np.uint8), np.ones((5, 5))
            at.append(jump(image, mask))
            inwards.append(jump(image, cv2.erode(mask, kernel)))
            outwards.append(jump(image, cv2.dilate(mask, kernel)))
    assert min(at) > 50
    assert np.median(at) > 8 * max(np.median(inwards), np.median(outwards))


def test_colour_says_nothing_about_the_category(scenes):
    """One-way analysis of variance: category explains no more of the mean colours than chance would."""
    categories = np.array([category for _, objects in scenes for category, _ in objects])
    colours = np.array([image[mask].mean(axis=0) for image, objects in scenes for _, mask in objects])
    means = np.array([colours[categories == i].mean(axis=0) for i in IDS])
    between = ((means[categories - 1] - colours.mean(axis=0)) ** 2).sum(axis=0)
    within = ((colours - means[categories - 1]) ** 2).sum(axis=0)
    f = (between / (len(IDS) - 1)) / (within / (len(colours) - len(IDS)))
    assert len(colours) > 150
    assert f.max() < 4.3  # chance exceeds this once in 1000, for 5 and 200 degrees of freedom
    assert colours.std(axis=0).min() > 40


@pytest.mark.parametrize(
    ('name', 'area'),  # for a circumscribed circle of radius 1
    [
        ('disc', np.pi),
        ('square', 1.4**2),
        ('triangle', 3**1.5 / 4),
        ('star', 5 * np.sin(np.pi / 5) * np.sin(np.pi / 10) / np.sin(7 * np.pi / 10)),
        ('cross', 2 * 1.9 * 0.5 - 0.5**2),
        ('ring', np.pi * (1 - 0.6**2)),
    ],
)
def test_shapes_have_the_area_of_geometry(name, area):
    y, x = (np.mgrid[:800, :800] - 399.5) / 360
    for angle in (0, 0.4, 2):
        inside = draw_dataset.SHAPES[name](x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle))
        assert inside.sum() / 360**2 == pytest.approx(area, rel=0.01)


def test_shapes_differ_under_any_rotation_and_size():
    """No shape comes closer than an IoU of 0.85 to another, both scaled to the same area and centred."""
    y, x = (np.mgrid[:128, :128] - 63.5) / 32

    def draw(name, angle):
        shape = draw_dataset.SHAPES[name]
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        inside = shape(u, v)
        scale = np.sqrt(inside.sum() / 32**2 / 1.5)
        mu, mv = u[inside].mean(), v[inside].mean()
        return shape(u * scale + mu, v * scale + mv)

    for first, second in itertools.combinations(CATEGORIES, 2):
        fixed = draw(first, 0)
        turned = [draw(second, angle) for angle in np.arange(0, 2 * np.pi, np.pi / 12)]
        assert max((fixed & other).sum() / (fixed | other).sum() for other in turned) < 0.85, (first, second)


def test_too_little_of_an_object_is_not_recognisable():
    disc = draw_dataset.SHAPES['disc'](*(np.mgrid[:SIZE, :SIZE] - 128) / 50)
    hole = draw_dataset.SHAPES['disc'](*(np.mgrid[:SIZE, :SIZE] - 128) / 45)
    small = draw_dataset.SHAPES['disc'](*(np.mgrid[:SIZE, :SIZE] - 128) / 5)
    left = np.arange(SIZE) < 128
    right = np.arange(SIZE) > 110
    assert draw_dataset.is_recognisable(disc, disc)
    assert draw_dataset.is_recognisable(disc, disc & right)
    assert not draw_dataset.is_recognisable(disc, disc & left)
    assert not draw_dataset.is_recognisable(disc, disc & ~hole)  # a rim, all of its outline shows
    assert not draw_dataset.is_recognisable(disc, hole)  # 81% of the area, none of the outline
    assert not draw_dataset.is_recognisable(small, small)


def test_placements_without_contrast_are_refused():
    image = np.full((SIZE, SIZE, 3), 100, np.uint8)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[50:60, 50:60] = True
    assert draw_dataset.stands_out(image, mask, image + 40)
    assert not draw_dataset.stands_out(image, mask, image + 20)
    half = image + 40
    half[50:55] = 100
    assert not draw_dataset.stands_out(image, mask, half)


@pytest.mark.parametrize(('split', 'ade', 'count'), [('train', 'training', 6), ('val', 'validation', 2)])
def test_layouts_agree_with_each_other(dataset, split, ade, count):
    coco = COCO(dataset / 'annotations' / f'instances_{split}2017.json')
    assert [category['name'] for category in coco.loadCats(coco.getCatIds())] == list(CATEGORIES)
    assert coco.getCatIds() == list(IDS)
    assert coco.getImgIds() == list(range(1, count + 1))
    assert sorted(coco.anns) == list(range(1, len(coco.anns) + 1))
    for image_id, info in coco.imgs.items():
        path = dataset / f'{split}2017' / info['file_name']
        assert info['file_name'] == f'{image_id:012d}.jpg'
        assert cv2.imread(path).shape == (info['height'], info['width'], 3) == (SIZE, SIZE, 3)
        assert path.read_bytes() == (dataset / 'ade' / 'images' / ade / path.name).read_bytes()

        labels = np.zeros((SIZE, SIZE), np.uint8)
        for annotation in coco.imgToAnns[image_id]:
            mask = coco.annToMask(annotation).astype(bool)
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
            assert annotation['bbox'] == [columns[0], rows[0], width, height]
            assert annotation['area'] == mask.sum() and annotation['iscrowd'] == 0
            assert isinstance(annotation['segmentation']['counts'], str)
            assert not labels[mask].any()
            labels[mask] = annotation['category_id']
        written = cv2.imread(dataset / 'ade' / 'annotations' / ade / f'{path.stem}.png', cv2.IMREAD_UNCHANGED)
        assert written.dtype == np.uint8
        np.testing.assert_array_equal(written, labels)


def test_written_image_is_the_drawn_scene(dataset):
    image, objects = draw_dataset.draw_scene(np.random.default_rng([3, 1, 2]))  # seed, split, image
    written = cv2.imread(dataset / 'val2017' / '000000000002.jpg')
    assert np.abs(written.astype(int) - image).mean() < 8
    labels = cv2.imread(dataset / 'ade' / 'annotations' / 'validation' / '000000000002.png', cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(labels, sum(category * mask for category, mask in objects))


def test_same_seed_writes_the_same_bytes(dataset, tmp_path):
    draw_dataset.write_dataset(tmp_path / 'again', train=6, val=2, seed=3)
    assert contents(tmp_path / 'again') == contents(dataset)


def test_another_seed_draws_other_images(dataset, tmp_path):
    draw_dataset.write_dataset(tmp_path / 'other', train=6, val=2, seed=4)
    other, first = contents(tmp_path / 'other'), contents(dataset)
    assert other.keys() == first.keys()
    assert not set(other.values()) & set(first.values())


def test_an_image_does_not_depend_on_the_counts(dataset, tmp_path):
    draw_dataset.write_dataset(tmp_path / 'fewer', train=2, val=1, seed=3)
    fewer, more = contents(tmp_path / 'fewer'), contents(dataset)
    drawn = [name for name in fewer if not name.endswith('.json')]
    assert len(drawn) == 9
    assert all(fewer[name] == more[name] for name in drawn)
    assert more['train2017/000000000001.jpg'] != more['val2017/000000000001.jpg']


def test_command_line_draws_once_and_leaves_other_folders_alone(tmp_path):
    out = tmp_path / 'deep' / 'shapes'
    first = run(out, '--train', 2, '--val', 1)
    annotations = json.loads((out / 'annotations' / 'instances_train2017.json').read_text())['annotations']
    assert first.returncode == 0, first.stderr
    assert f'wrote {out}' in first.stdout
    assert f'train: 2 images, {len(annotations)} objects (' in first.stdout
    assert os.listdir(out.parent) == ['shapes']

    before = contents(out), out.stat().st_mtime_ns
    again = run(out, '--train', 2, '--val', 1)
    assert again.returncode == 0 and 'already holds this data set' in again.stdout
    other = run(out, '--train', 3, '--val', 1)
    assert other.returncode == 2 and 'remove it or name another folder' in other.stderr
    assert (contents(out), out.stat().st_mtime_ns) == before


@pytest.mark.parametrize('name', ['train', 'val', 'seed'])
def test_negative_values_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f'^{name} is -1, but must be 0 or more$'):
        draw_dataset.write_dataset(tmp_path / 'shapes', **{'train': 1, 'val': 1, 'seed': 0, name: -1})
    assert not any(tmp_path.iterdir())


def test_bad_input_exits_2_with_one_line(tmp_path):
    (tmp_path / 'half' / 'annotations').mkdir(parents=True)
    (tmp_path / 'half' / 'annotations' / 'instances_train2017.json').write_text('{"info": ')
    for arguments in [(tmp_path / 'half',), (tmp_path / 'new', '--seed', -1)]:
        result = run(*arguments)
        assert result.returncode == 2
        assert result.stderr.startswith('draw_dataset.py: error: ') and result.stderr.count('\n') == 1
    assert os.listdir(tmp_path) == ['half']


def test_what_is_there_already_is_left_alone(tmp_path):
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'empty').mkdir()
    for name in ('file', 'empty', 'file/inside'):
        with pytest.raises(OSError):
            draw_dataset.write_dataset(tmp_path / name, train=1, val=0, seed=0)
    assert contents(tmp_path) == {'file': b'mine'}
    assert not any((tmp_path / 'empty').iterdir())


def test_a_failing_run_leaves_nothing(tmp_path, monkeypatch):
    def fail(category, mask):
        raise OSError('disk full')

    monkeypatch.setattr(draw_dataset, 'describe', fail)
    with pytest.raises(OSError, match='disk full'):
        draw_dataset.write_dataset(tmp_path / 'shapes', train=1, val=0, seed=0)
    assert not any(tmp_path.iterdir())
