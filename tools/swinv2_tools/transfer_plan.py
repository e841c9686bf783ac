"""What a study of position biases trains and measures: settings, runs, conditions and steps.

A run is one kind of position bias and one seed. It is a list of steps, each of which leaves a file in the folder of the
run: weights (``after_20_epochs.pth``) or measurements (``after_20_epochs/*.npz``). A step whose file is there is done.
So a study that was interrupted or is extended goes on where it ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Settings(NamedTuple):
    """What all runs of a study share. Images in pixels, windows in tokens."""

    data_root: str
    photo_size: int  # of a photo as it is read; larger images are enlarged from it
    image_size: int
    window_size: int
    patch_size: int
    embed_dims: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    batch_size: int
    lr: float
    bias_lr_mult: float  # learning rate of the position bias over that of the rest
    finetune_iters: int
    finetune_lr: float
    ratios: tuple[float, ...]  # of image and window to those of training
    grids: tuple[int, ...]  # photos per side of a canvas


class Condition(NamedTuple):
    """Where a classifier is measured.

    Attributes:
        image_size (int): of one photo, in pixels.
        window_size (int): in tokens; where a map is smaller, so is the window.
        grid (int): photos per side of a canvas, which the backbone sees as one image.
    """

    image_size: int
    window_size: int
    grid: int = 1


class Run(NamedTuple):
    """A kind of position bias and a seed."""

    position_bias: str
    seed: int

    def folder(self, out: Path) -> Path:
        return out / f'{self.position_bias}_seed_{self.seed}'


class Step(NamedTuple):
    """A part of a run.

    Attributes:
        epochs (int): how long the classifier has been trained from scratch.
        condition (Condition): where it is measured. None: the step is that training.
        finetuned (bool): whether it is trained there a little before it is measured.
    """

    epochs: int
    condition: Condition | None = None
    finetuned: bool = False

    def file(self, folder: Path) -> Path:
        """The file that the step leaves in the folder of its run."""
        if self.condition is None:
            return folder / f'after_{self.epochs}_epochs.pth'
        size, window, grid = self.condition
        kind = 'finetuned' if self.finetuned else 'measured'
        return folder / f'after_{self.epochs}_epochs/{kind}_{size}_pixels_window_{window}_grid_{grid}.npz'


def training_condition(settings: Settings) -> Condition:
    """The condition of the training from scratch."""
    return Condition(settings.image_size, settings.window_size)


def enlarged(settings: Settings) -> list[Condition]:
    """Larger images, with windows in proportion and with the window of training; and larger windows at the old size."""
    size, window = settings.image_size, settings.window_size
    pairs = [(round(ratio * size), round(ratio * window)) for ratio in settings.ratios]
    return [Condition(*pair) for large, wide in pairs for pair in ((large, wide), (large, window), (size, wide))]


def canvases(settings: Settings) -> list[Condition]:
    """Photos as in training, on canvases: with windows in proportion to the canvas, and with the window of training."""
    size, window = settings.image_size, settings.window_size
    return [Condition(size, wide, grid) for grid in settings.grids for wide in (grid * window, window)]


def is_moved(condition: Condition, start: Condition) -> bool:
    """Whether image and window are larger at a condition than at the condition of training."""
    larger = condition.image_size * condition.grid > start.image_size
    return larger and condition.window_size > start.window_size


def largest_canvas(settings: Settings) -> Condition:
    """The canvas with the most photos, and windows in proportion to it; without canvases, the condition of training."""
    return max(canvases(settings), default=training_condition(settings), key=lambda canvas: canvas.window_size)


def windows_at(settings: Settings, condition: Condition) -> tuple[int, ...]:
    """The window of each stage in tokens, no larger than its map."""
    side = condition.image_size * condition.grid // settings.patch_size
    return tuple(min(condition.window_size, side // 2**i) for i in range(len(settings.depths)))


def plan(settings: Settings, epochs: int, curve: Sequence[int]) -> list[Step]:
    """The steps of a run.

    Args:
        settings (Settings): of the study.
        epochs (int): how long to train. Then everything is measured, and last again after fine-tuning where window and
            image are larger than in training.
        curve (Sequence[int]): after how many epochs canvases are measured too.
    """
    start = training_condition(settings)
    steps = []
    for count in sorted({*(count for count in curve if count < epochs), epochs}):
        conditions = [start, *canvases(settings), *(enlarged(settings) if count == epochs else ())]
        steps += [Step(count), *(Step(count, condition) for condition in conditions)]
    if settings.finetune_iters:
        moved = [condition for condition in conditions if is_moved(condition, start)]
        steps += [Step(epochs, condition, finetuned=True) for condition in moved]
    return steps
