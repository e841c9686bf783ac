"""Predictions drawn into images, with labels and lines in proportion to the image, by any visualizer of mmengine."""

from __future__ import annotations

import inspect
import math

import cv2
import numpy as np
from matplotlib.text import Text
from mmengine.visualization import Visualizer

HOSTS = {  # what draws predictions in mmdet and mmseg: the visualizer, and the hook that calls it
    'mmdet': ('DetLocalVisualizer', 'DetVisualizationHook'),
    'mmseg': ('SegLocalVisualizer', 'SegVisualizationHook'),
}
SIDE, DPI = 550, 100  # pixels: at this dpi, the hosts' lines suit an image as large as a square of this side
LINE = 29  # dpi that draws the hosts' lines one pixel wide
TEXT = 1 / 40  # height of a line of text, in sides
LEGIBLE = 9  # pixels, of a line of text
SMALLEST = 160  # side of images that get labels: a label in smaller ones covers what it names
CENTRED = {  # a label of a region, which looks as those of mmdet
    'colors': 'white',
    'horizontal_alignments': 'center',
    'vertical_alignments': 'center',
    'bboxes': [{'facecolor': 'black', 'alpha': 0.8, 'pad': 0.7, 'edgecolor': 'none'}],
}


def draw_to_scale(visualizer: Visualizer) -> Visualizer:
    """Make a visualizer draw labels and lines in proportion to the image, and no labels into a tiny one.

    The side of an image is that of a square as large as it. Labels are never too small to read, and those that would
    leave the image are moved into it.

    Args:
        visualizer (Visualizer): of mmdet, mmseg or the user. It is changed in place: mmengine knows it by name.
    """
    set_image, draw_texts = visualizer.set_image, visualizer.draw_texts

    def side():
        return math.sqrt(visualizer.width * visualizer.height)

    def set_scaled_image(image):
        dpi = max(DPI * math.sqrt(image.shape[0] * image.shape[1]) / SIDE, LINE)
        visualizer.dpi = visualizer.fig_save.dpi = dpi  # the image gives the figure its size in pixels
        set_image(image)

    def draw_scaled_texts(texts, positions, font_sizes=None, *args, **kwargs):
        if side() >= SMALLEST:
            drawn = len(visualizer.ax_save.texts)
            draw_texts(texts, positions, max(TEXT * side(), LEGIBLE) * 72 / visualizer.dpi, *args, **kwargs)
            for text in visualizer.ax_save.texts[drawn:]:
                move_inside(text, visualizer)
        return visualizer

    visualizer.set_image, visualizer.draw_texts = set_scaled_image, draw_scaled_texts
    draw_sem_seg = getattr(visualizer, '_draw_sem_seg', None)
    if draw_sem_seg and 'with_labels' in inspect.signature(draw_sem_seg).parameters:  # mmseg, whose labels are OpenCV's

        def draw_labelled(image, sem_seg, classes, palette, with_labels=True):
            picture = draw_sem_seg(image, sem_seg, classes, palette, with_labels=False)
            if not with_labels or side() < SMALLEST:
                return picture
            for label, place in places(np.asarray(sem_seg.cpu().data)[0], len(classes)).items():
                visualizer.draw_texts(classes[label], place, **CENTRED)
            return visualizer.get_image()

        visualizer._draw_sem_seg = draw_labelled
    return visualizer


def move_inside(text: Text, visualizer: Visualizer) -> None:
    """Move a text that would leave the image."""
    box = text.get_window_extent(visualizer.fig_save_canvas.get_renderer())  # from the lower left corner
    x, y = text.get_position()  # from the upper left corner
    x += max(0, -box.x0) - max(0, box.x1 - visualizer.width)
    y += max(0, box.y1 - visualizer.height) - max(0, -box.y0)
    text.set_position((x, y))


def places(labels: np.ndarray, classes: int) -> dict[int, np.ndarray]:
    """Where there is most room for the name of each class: (x, y), the point of its regions furthest from their edges.

    Args:
        labels (np.ndarray): (H, W), of classes. Others than 0 to ``classes`` - 1 are left out, as are those of
            fewer pixels than a letter has.
        classes (int): how many there are.
    """
    step = max(1, max(labels.shape) // 500)  # close enough, and soon found
    labels = labels[::step, ::step].astype(np.int64)
    smallest, found = labels.size * TEXT**2, {}  # pixels: those of a letter
    labels = np.pad(labels, 1, constant_values=-1)  # the edge of the image is one too
    for label, count in zip(*np.unique(labels, return_counts=True)):
        if 0 <= label < classes and count >= smallest:
            distance = cv2.distanceTransform((labels == label).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
            y, x = np.unravel_index(distance.argmax(), distance.shape)
            found[int(label)] = step * (np.array([x, y]) - 0.5)  # of the middle of a pixel, without the padding
    return found
