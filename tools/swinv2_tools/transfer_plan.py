"""What a study of position biases trains and measures: settings, runs, conditions and steps.

A run is one kind of position bias and one seed. It is a list of steps, each of which leaves a file in the folder of the
run: weights (``after_20_epochs.pth``) or measurements (``after_20_epochs/*.npz``). A step whose file is there is done.
So a study that was interrupted or is extended goes on where it ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

CENTRE = 3  # tokens: up to this offset, a position bias is at its centre


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
    mlp_lr_mult: float  # learning rate of the position MLP over that of the rest
    table_lr_mult: float  # the same for the learned table of parameterized
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


def larger_images(settings: Settings) -> list[Condition]:
    """Larger images, with windows in proportion and with the window of training."""
    sizes = [(round(ratio * settings.image_size), round(ratio * settings.window_size)) for ratio in settings.ratios]
    return [Condition(large, window) for large, wide in sizes for window in (wide, settings.window_size)]


def larger_windows(settings: Settings) -> list[Condition]:
    """Images as in training, with larger windows, as far as the maps have room for them."""
    found = {windows_at(settings, training_condition(settings)): None}
    for ratio in settings.ratios:
        condition = Condition(settings.image_size, round(ratio * settings.window_size))
        found.setdefault(windows_at(settings, condition), condition)
    return [condition for condition in found.values() if condition]


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


def has_wrong_window(settings: Settings, run: Run, condition: Condition) -> bool:
    """Whether a run is also measured with the windows of a condition as pretrained windows, where these are others."""
    own, trained = (windows_at(settings, place) for place in (condition, training_condition(settings)))
    return run.position_bias == 'log_cpb' and own != trained


def plan(settings: Settings, epochs: int, curve: Sequence[int]) -> list[Step]:
    """The steps of a run.

    Args:
        settings (Settings): of the study.
        epochs (int): how long to train. Then everything is measured, and all but larger windows on images as in
            training again after fine-tuning.
        curve (Sequence[int]): after how many epochs to measure canvases, and images of up to twice the size.
    """
    start, steps = training_condition(settings), []
    enlarged = [c for c in larger_images(settings) if is_moved(c, start) and c.image_size <= 2 * start.image_size]
    for count in sorted(count for count in {*curve} if count < epochs):
        steps += [Step(count), *(Step(count, condition) for condition in (start, *canvases(settings), *enlarged))]
    places = [start, *canvases(settings), *larger_images(settings)]
    steps += [Step(epochs), *(Step(epochs, condition) for condition in (*places, *larger_windows(settings)))]
    if settings.finetune_iters:
        steps += [Step(epochs, condition, finetuned=True) for condition in places]
    return steps


class Work:
    """The work of a study, by the files of its runs: pixels that pass the backbone, times three in training.

    Args:
        settings (Settings): of the study.
        runs (Sequence[Run]): the runs.
        steps (Sequence[Step]): of each.
        numbers (dict): of photos, by split.
        out (Path): folder of the study.
    """

    def __init__(self, settings: Settings, runs: Sequence[Run], steps: Sequence[Step], numbers: dict, out: Path):
        self.settings, self.runs, self.steps, self.numbers, self.out = settings, runs, steps, numbers, out

    def total(self) -> int:
        return sum(
            self._training(self._last()) + sum(self._cost(step, run) for step in self.steps) for run in self.runs
        )

    def done(self) -> int:
        work = 0
        for run in self.runs:
            folder = run.folder(self.out)
            work += self._training(min(trained_epochs(folder), self._last()))
            work += sum(self._cost(step, run) for step in self.steps if step.file(folder).exists())
        return work

    def _last(self):
        return max(step.epochs for step in self.steps)

    def _training(self, epochs):
        return 3 * epochs * self.numbers['train'] * self.settings.image_size**2

    def _cost(self, step, run):
        """The work of a step, except for training from scratch."""
        if step.condition is None:
            return 0
        tuning = 3 * self.settings.finetune_iters * self.settings.batch_size if step.finetuned else 0
        arms = 1 + has_wrong_window(self.settings, run, step.condition)
        return arms * (self.numbers['val'] + tuning) * step.condition.image_size**2


def trained_epochs(folder: Path) -> int:
    """How many epochs a run has been trained, by the newest checkpoint in its folder."""
    return max((int(path.stem[len('epoch_') :]) for path in folder.glob('epoch_*.pth')), default=0)
