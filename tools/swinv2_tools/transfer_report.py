"""Tables of a study of position biases, from the files that its steps left."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from swinv2_mm.writing import whole
from swinv2_tools.intervals import Interval, interval
from swinv2_tools.transfer_plan import Condition, Step

REFERENCE = 'log_cpb'
WRONG = 'log_cpb, wrong window'
ARMS = 'parameterized', 'linear_cpb', REFERENCE, WRONG
FILE = re.compile(r'(\w+)_seed_(\d+)/after_(\d+)_epochs/(measured|finetuned)_(\d+)_pixels_window_(\d+)_grid_(\d+)\.npz')


class Row(NamedTuple):
    """One arm at one condition: means over seeds and photos, with 95 percent intervals.

    An arm is a kind of position bias, or log_cpb with the wrong pretrained window. Differences are from log_cpb with
    the right one, photo by photo, over the seeds that both have. Changes are of the arm with the wrong window, over the
    norm with the right one.
    """

    epochs: int
    finetuned: bool
    condition: Condition
    arm: str
    seeds: int
    top1: Interval  # percent
    cross_entropy: Interval  # nats
    top1_difference: Interval | None
    cross_entropy_difference: Interval | None
    moving_difference: Interval | None  # of cross-entropy, less the same difference at the condition of training
    logit_change: Interval | None
    feature_change: Interval | None
    bias_std: float | None  # mean over heads and seeds, at the window of training
    bias_centre: float | None

    def place(self) -> tuple[int, bool, Condition]:
        return self.epochs, self.finetuned, self.condition


def read_measurements(out: Path) -> dict[Step, dict[str, dict[int, dict[str, np.ndarray]]]]:
    """What was measured, by step, arm and seed.

    Args:
        out (Path): the folder of the study.
    """
    measured = {}
    for path in sorted(out.glob('*/after_*_epochs/*.npz')):
        match = FILE.fullmatch(path.relative_to(out).as_posix())
        if not match:
            continue
        seed, epochs, size, window, grid = (int(match[i]) for i in (2, 3, 5, 6, 7))
        arms = measured.setdefault(Step(epochs, Condition(size, window, grid), match[4] == 'finetuned'), {})
        with np.load(path) as arrays:
            values = dict(arrays)
        arms.setdefault(match[1], {})[seed] = values
        wrong = {name[len('wrong_') :]: value for name, value in values.items() if name.startswith('wrong_')}
        if wrong:
            wrong.update(logit_change=values.pop('logit_change'), feature_change=values.pop('feature_change'))
            arms.setdefault(WRONG, {})[seed] = wrong
    return measured


def summarise(measured: dict, start: Condition) -> list[Row]:
    """The rows of a table, in the order of epochs, conditions and arms.

    Args:
        measured (dict): of `read_measurements`.
        start (Condition): that of training.
    """
    order = sorted(measured, key=lambda step: (step.epochs, step.finetuned, step.condition))
    return [
        _row(step, measured[step], measured.get(Step(step.epochs, start), {}), arm)
        for step in order
        for arm in ARMS
        if arm in measured[step]
    ]


def _row(step, arms, at_start, arm):
    by_seed, reference = arms[arm], arms.get(REFERENCE, {})
    common = sorted(by_seed.keys() & reference.keys()) if arm != REFERENCE else []

    def mean(name, scale=1.0):
        values = [scale * by_seed[seed][name] for seed in sorted(by_seed) if name in by_seed[seed]]
        return interval(np.stack(values)) if values else None

    def difference(name, scale=1.0):
        values = [scale * by_seed[seed][name] - scale * reference[seed][name] for seed in common]
        return interval(np.stack(values)) if values else None

    def moving_difference():
        start, start_of_reference = at_start.get(REFERENCE if arm == WRONG else arm, {}), at_start.get(REFERENCE, {})
        values = [
            (by_seed[seed]['cross_entropy'] - start[seed]['cross_entropy'])
            - (reference[seed]['cross_entropy'] - start_of_reference[seed]['cross_entropy'])
            for seed in common
            if seed in start and seed in start_of_reference
        ]
        return interval(np.stack(values)) if values else None

    def mean_of_heads(name):
        values = [value[name] for value in by_seed.values() if name in value]
        return float(np.mean(values)) if values else None

    return Row(
        epochs=step.epochs,
        finetuned=step.finetuned,
        condition=step.condition,
        arm=arm,
        seeds=len(by_seed),
        top1=mean('correct', 100.0),
        cross_entropy=mean('cross_entropy'),
        top1_difference=difference('correct', 100.0),
        cross_entropy_difference=difference('cross_entropy'),
        moving_difference=moving_difference(),
        logit_change=mean('logit_change'),
        feature_change=mean('feature_change'),
        bias_std=mean_of_heads('bias_std'),
        bias_centre=mean_of_heads('bias_centre'),
    )


def write_csv(rows: Iterable[Row], path: Path, photo_size: int) -> None:
    """Write rows as CSV. Of an interval there are two columns, the mean and the half width.

    Args:
        rows (Iterable[Row]): what to write.
        path (Path): the file.
        photo_size (int): of the photos as they were read, in pixels; larger images are enlarged from it.
    """
    intervals = [
        *('top1', 'cross_entropy', 'top1_difference', 'cross_entropy_difference', 'moving_difference'),
        *('logit_change', 'feature_change'),
    ]
    with whole(path) as partial, partial.open('w', newline='') as file:
        writer = csv.writer(file)
        columns = ['epochs', 'finetuned', 'image_size', 'window_size', 'grid', 'enlarged', 'arm', 'seeds']
        columns += [f'{name}{end}' for name in intervals for end in ('', '_half')]
        writer.writerow([*columns, 'bias_std', 'bias_centre'])
        for row in rows:
            size, window, grid = row.condition
            values = [value for name in intervals for value in (getattr(row, name) or (None, None))]
            numbers = ['' if value is None else f'{value:.6g}' for value in (*values, row.bias_std, row.bias_centre)]
            place = row.epochs, int(row.finetuned), size, window, grid, int(size > photo_size)
            writer.writerow([*place, row.arm, row.seeds, *numbers])


def table(rows: Sequence[Row], epochs: int, photo_size: int) -> str:
    """What was measured after some epochs, as a table in Markdown.

    Args:
        rows (Sequence[Row]): of `summarise`.
        epochs (int): whose rows to take.
        photo_size (int): as in `write_csv`.
    """
    rows = [row for row in rows if row.epochs == epochs]
    seeds = {
        arm: max(row.seeds for row in rows if row.arm == arm) for arm in ARMS if any(row.arm == arm for row in rows)
    }
    heads = [f'{arm}, {number} seed{"s" * (number > 1)}' for arm, number in seeds.items()]
    lines = [
        f'After {epochs} epochs: top-1 in percent; of other arms than {REFERENCE}, where it has been measured, the',
        'difference from it, paired by photo and seed, in top-1 and (in brackets) in cross-entropy, 1/1000 nat, with',
        '95 percent intervals over seeds and photos, or over photos alone if there is one seed.',
        '',
        f'| image | window | photos | tuned | {" | ".join(heads)} |',
        '|---' * (4 + len(heads)) + '|',
    ]
    for _, finetuned, condition in dict.fromkeys(row.place() for row in rows):
        cells = {row.arm: _cell(row) for row in rows if row.place()[1:] == (finetuned, condition)}
        size = f'{condition.image_size}{" enlarged" if condition.image_size > photo_size else ""}'
        words = size, condition.window_size, condition.grid**2, 'yes' if finetuned else 'no'
        lines.append(f'| {" | ".join(map(str, words))} | {" | ".join(cells.get(arm, "") for arm in seeds)} |')
    return '\n'.join(lines)


def _cell(row):
    if row.top1_difference is None:
        return f'{row.top1.mean:.1f} ± {row.top1.half:.1f}'
    top1, entropy = row.top1_difference, row.cross_entropy_difference
    return f'{top1.mean:+.1f} ± {top1.half:.1f} ({1000 * entropy.mean:+.0f} ± {1000 * entropy.half:.0f})'
