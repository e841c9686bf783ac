"""Overlays: labels and lines are in proportion to the image, lie inside it, and do not cover a tiny one."""

import cv2
import mmcv
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData, PixelData
from mmengine.visualization import Visualizer
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer

CLASSES, PALETTE = ('traffic light', 'dog', 'car'), [(230, 60, 60), (60, 120, 240), (50, 180, 80)]
BOXES = [(0.1, 0.1, 0.5, 0.4), (0.85, 0.2, 0.98, 0.45), (0.2, 0.6, 0.3, 0.7), (0.55, 0.6, 0.6, 0.9)]  # of the image
LABELS = [0, 0, 1, 2]
GREY = 120


@pytest.fixture(scope='module')
def overlays(load_tool):
    return load_tool('overlays')


class Own(Visualizer):
    """A user's own visualizer, which asks for sizes of its own."""

    def add_datasample(self, name, image, data_sample, out_file=None, **kwargs):
        self.set_image(image)
        self.draw_bboxes(data_sample.pred_instances.bboxes)
        for label, box in zip(LABELS, data_sample.pred_instances.bboxes):
            self.draw_texts(CLASSES[label], box[:2] + 1, font_sizes=40, bboxes=dict(facecolor='black', pad=0.7))
        mmcv.imwrite(self.get_image()[..., ::-1], out_file)


KINDS = {'detector': DetLocalVisualizer, 'segmentor': SegLocalVisualizer, 'own': Own}


def sample_of(kind, width, height):
    """Four things, in the same places of an image of any size: as instances, or as regions of a void."""
    boxes = torch.tensor(BOXES) * torch.tensor([width, height, width, height])
    if kind != 'segmentor':
        found = dict(bboxes=boxes, labels=torch.tensor(LABELS))
        scored = InstanceData(**found, scores=torch.full((4,), 0.5))
        return DetDataSample(pred_instances=scored, gt_instances=InstanceData(**found))
    labels = torch.full((1, height, width), 255, dtype=torch.uint8)
    for label, (left, top, right, bottom) in zip(LABELS, boxes.int().tolist()):
        labels[:, top:bottom, left:right] = label
    return SegDataSample(pred_sem_seg=PixelData(data=labels), gt_sem_seg=PixelData(data=labels))


@pytest.fixture
def draw(overlays, tmp_path):
    """Draw predictions into a grey image; returns the picture with labels, and without."""

    def draw(kind, width, height, scaled=True, **kwargs):
        visualizer = KINDS[kind]()
        visualizer.dataset_meta = dict(classes=CLASSES, palette=PALETTE)
        if scaled:
            assert overlays.draw_to_scale(visualizer) is visualizer
        image, path = np.full((height, width, 3), GREY, np.uint8), str(tmp_path / 'x.png')
        pictures = []
        for with_labels in (True, False):
            if not with_labels:
                visualizer.draw_texts = lambda *args, **kwargs: visualizer
                kwargs.update(dict(with_labels=False) if kind == 'segmentor' else {})
            visualizer.add_datasample('x', image, sample_of(kind, width, height), out_file=path, **kwargs)
            pictures.append(cv2.imread(path).astype(int))
        return pictures

    return draw


def boxes_of_labels(labelled, plain):
    """Of each label in a picture: left, top, width and height, in pixels."""
    differs = (labelled != plain).any(2).astype(np.uint8)
    return cv2.connectedComponentsWithStats(differs, connectivity=8)[2][1:, :4]


@pytest.mark.parametrize('kind', KINDS)
def test_labels_and_lines_are_in_proportion_to_the_image(draw, kind):
    heights, lines = [], []
    for width, height in ((640, 480), (2000, 1500)):
        side = (width * height) ** 0.5
        labelled, plain = draw(kind, width, height, draw_gt=False)
        labels = boxes_of_labels(labelled, plain)
        assert len(labels) == (3 if kind == 'segmentor' else 4)  # a class is named once
        assert 0.02 * side < labels[:, 3].min() and labels[:, 3].max() < 0.05 * side
        heights.append(labels[:, 3].mean() / side)
        assert (labels[:, 0] >= 0).all() and (labels[:, :2] + labels[:, 2:] <= (width, height)).all()
        if kind != 'segmentor':
            first, last = labels[labels[:, 1] < 0.5 * height, 2]  # of the same name, the last beside the edge
            assert first == pytest.approx(last, rel=0.02)  # it is not cut, but for the margin
            across = abs(plain[int(0.65 * height), : width // 2] - GREY).sum(-1)  # two sides of a box
            lines.append(across.sum() / across.max() / 2 / side)
    assert heights[1] == pytest.approx(heights[0], rel=0.1)
    if kind != 'segmentor':
        assert lines[1] == pytest.approx(lines[0], rel=0.25)  # mmengine cuts the widest in small images
        assert 0.004 < lines[1] < 0.01


@pytest.mark.parametrize('kind', KINDS)
def test_labels_do_not_cover_a_tiny_image(draw, kind):
    labelled, plain = draw(kind, 64, 64, draw_gt=False)
    assert np.array_equal(labelled, plain)
    assert (plain != GREY).any(2).mean() > 0.05  # what is found is drawn
    labelled, plain = draw(kind, 64, 64, scaled=False, draw_gt=False)
    assert (labelled != plain).any(2).mean() > (0.03 if kind == 'segmentor' else 0.25)  # of the visualizers themselves
    labelled, plain = draw(kind, 160, 160, draw_gt=False)
    assert 0.02 < (labelled != plain).any(2).mean() < 0.25
    assert boxes_of_labels(labelled, plain)[:, 3].min() >= 9  # pixels: it can be read


@pytest.mark.parametrize('kind', ['detector', 'segmentor'])
def test_ground_truth_stands_beside_the_prediction(draw, kind):
    labelled, plain = draw(kind, 320, 240)
    assert labelled.shape == (240, 640, 3)
    left, right = np.hsplit(labelled, 2)
    if kind == 'segmentor':
        assert np.array_equal(left, right)
    else:
        ours, theirs = (boxes_of_labels(*pair)[:, 2].sum() for pair in zip((left, right), np.hsplit(plain, 2)))
        assert ours < theirs  # which have scores


def test_texts_take_their_colours_by_position(overlays):
    visualizer = overlays.draw_to_scale(Visualizer())
    visualizer.set_image(np.zeros((200, 200, 3), np.uint8))
    visualizer.draw_texts('x', np.array([50, 50]), 12, 'red')
    assert [text.get_color() for text in visualizer.ax_save.texts] == ['red']


def test_a_label_stands_where_its_region_is_widest(overlays):
    labels = np.full((45, 60), 7)
    labels[5:25, 10:30] = 1  # a square, and its thin tail
    labels[22:25, 10:55] = 1
    labels[:9, :9] = 0  # the edges of the image are edges
    labels[30:32, 30] = 2  # 2 of 2700 pixels, more than those of a letter, 1 of 1600
    labels[40, 50] = 3  # less
    found = overlays.places(labels, 4)
    assert sorted(found) == [0, 1, 2]
    for label, place in found.items():
        outside = np.argwhere(np.pad(labels, 1, constant_values=-1) != label) - 1
        inside = np.argwhere(labels == label)
        distances = np.linalg.norm(inside[:, None] - outside, axis=2).min(1)
        best = inside[distances > distances.max() - 1e-6][:, ::-1] + 0.5  # (x, y) of the middles of pixels
        assert place.tolist() in best.tolist()
    large = overlays.places(np.kron(labels, np.ones((40, 40), int)), 4)  # of which every fourth pixel is looked at
    for label in (0, 1):
        np.testing.assert_allclose(large[label], 40 * found[label], atol=40)
