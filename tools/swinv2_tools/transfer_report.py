"""Tables and plots of a study of position biases, from the files that its steps left."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use('Agg')  # no display needed
import matplotlib.pyplot as plt
import numpy as np

from swinv2_mm.writing import whole
from swinv2_tools.intervals import Interval, interval
from swinv2_tools.transfer_plan import Condition, Settings, Step, canvases, enlarged, is_moved, training_condition

REFERENCE = 'log_cpb'
WRONG = 'log_cpb, wrong window'
ARMS = 'parameterized', 'linear_cpb', REFERENCE, WRONG
COLOURS = dict(zip(ARMS, ('tab:orange', 'tab:green', 'tab:blue', 'tab:red')))
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


def summarise(measured: dict) -> list[Row]:
    """The rows of a table, in the order of epochs, conditions and arms.

    Args:
        measured (dict): of `read_measurements`.
    """
    order = sorted(measured, key=lambda step: (step.epochs, step.finetuned, step.condition))
    return [_row(step, measured[step], arm) for step in order for arm in ARMS if arm in measured[step]]


def _row(step, arms, arm):
    by_seed, reference = arms[arm], arms.get(REFERENCE, {})
    common = sorted(by_seed.keys() & reference.keys()) if arm != REFERENCE else []

    def mean(name, scale=1.0):
        values = [scale * by_seed[seed][name] for seed in sorted(by_seed) if name in by_seed[seed]]
        return interval(np.stack(values)) if values else None

    def difference(name, scale=1.0):
        values = [scale * by_seed[seed][name] - scale * reference[seed][name] for seed in common]
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
    intervals = 'top1', 'cross_entropy', 'top1_difference', 'cross_entropy_difference', 'logit_change', 'feature_change'
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


def table(rows: Sequence[Row], photo_size: int) -> str:
    """The measurements after the last epoch as a table in Markdown."""
    last = max(row.epochs for row in rows)
    arms = [arm for arm in ARMS if any(row.arm == arm for row in rows)]
    lines = [
        f'After {last} epochs: top-1 in percent, with 95 percent intervals over seeds and photos; of other arms the',
        f'difference from {REFERENCE}, paired by photo, in top-1 and (in brackets) in cross-entropy, 1/1000 nat.',
        '',
        f'| image | window | photos | tuned | {" | ".join(arms)} |',
        '|---' * (4 + len(arms)) + '|',
    ]
    places = list(dict.fromkeys(row.place() for row in rows if row.epochs == last))
    for epochs, finetuned, condition in places:
        cells = {row.arm: _cell(row) for row in rows if row.place() == (epochs, finetuned, condition)}
        size = f'{condition.image_size}{" enlarged" if condition.image_size > photo_size else ""}'
        words = size, condition.window_size, condition.grid**2, 'yes' if finetuned else 'no'
        lines.append(f'| {" | ".join(map(str, words))} | {" | ".join(cells.get(arm, "") for arm in arms)} |')
    return '\n'.join(lines)


def _cell(row):
    if row.top1_difference is None:
        return f'{row.top1.mean:.1f} ± {row.top1.half:.1f}'
    top1, entropy = row.top1_difference, row.cross_entropy_difference
    return f'{top1.mean:+.1f} ± {top1.half:.1f} ({1000 * entropy.mean:+.0f} ± {1000 * entropy.half:.0f})'


def plot_windows(rows: Sequence[Row], settings: Settings, out: Path) -> None:
    """Write a PNG: top-1 over the window, and below the difference in cross-entropy from log_cpb, a line per arm.

    A dashed line shows log_cpb on the same images in windows as in training.
    """
    last = max(row.epochs for row in rows)
    rows = [row for row in rows if row.epochs == last]
    start, panels = training_condition(settings), []
    for title, conditions in (('larger images', enlarged(settings)), ('larger canvases', canvases(settings))):
        moved = [start, *(condition for condition in conditions if is_moved(condition, start))]
        for finetuned in (False, True):
            chosen = [row for row in rows if row.condition in moved[1:] and row.finetuned == finetuned]
            if chosen:
                chosen += [row for row in rows if row.condition == start]
                panels.append((f'{title}{", fine-tuned" * finetuned}', moved, chosen))
    figure, axes = plt.subplots(
        2, len(panels), figsize=(4.2 * len(panels), 7), layout='constrained', squeeze=False, sharey='row'
    )
    for (title, moved, chosen), (upper, lower) in zip(panels, axes.T):
        for place, arm in enumerate(ARMS):
            of_arm = sorted((row for row in chosen if row.arm == arm), key=lambda row: row.condition.window_size)
            windows = np.array([row.condition.window_size for row in of_arm]) + 0.25 * (place - 1.5)
            _draw(upper, windows, [row.top1 for row in of_arm], arm)
            if arm != REFERENCE:
                _draw(lower, windows, [row.cross_entropy_difference or Interval(np.nan, 0) for row in of_arm], arm)
        _draw_kept(upper, rows, moved)
        upper.set(title=title)
        lower.set(xlabel='window (tokens)')
        lower.axhline(0, color=COLOURS[REFERENCE], linewidth=1)
        for panel in (upper, lower):
            panel.set_xticks([condition.window_size for condition in moved])
            panel.grid(alpha=0.3)
    axes[0, 0].set(ylabel='top-1 (percent)')
    axes[1, 0].set(ylabel=f'cross-entropy minus that of {REFERENCE} (nats)')
    _finish(figure, axes[0, 0], out)


def _draw_kept(axes, rows, moved):
    """Draw top-1 of log_cpb for some conditions, the first of them that of training, but in windows as in training."""
    top1 = {row.condition: row.top1.mean for row in rows if row.arm == REFERENCE and not row.finetuned}
    points = [
        (condition.window_size, top1.get(condition._replace(window_size=moved[0].window_size), np.nan))
        for condition in moved
    ]
    axes.plot(*zip(*points), '--', color='0.4', label=f'{REFERENCE}, windows as in training')


def plot_epochs(rows: Sequence[Row], settings: Settings, out: Path) -> None:
    """Write a PNG over the epochs: differences on canvases, changes by the wrong window, shape of the bias."""
    start = training_condition(settings)
    grown = [c for c in canvases(settings) if c.window_size > start.window_size]
    figure, axes = plt.subplots(1, len(grown) + 2, figsize=(4.2 * (len(grown) + 2), 4), layout='constrained')
    for condition, panel in zip(grown, axes):
        for arm in (arm for arm in ARMS if arm != REFERENCE):
            chosen = [row for row in _untuned(rows, condition, arm) if row.cross_entropy_difference]
            _draw(panel, [row.epochs for row in chosen], [row.cross_entropy_difference for row in chosen], arm)
        panel.axhline(0, color=COLOURS[REFERENCE], linewidth=1)
        panel.set(
            title=f'{condition.grid} x {condition.grid} photos, window {condition.window_size}',
            ylabel=f'cross-entropy minus that of {REFERENCE} (nats)',
        )
    changes, shapes = axes[len(grown) :]
    for condition, style in zip(grown, ('-', '--', ':', '-.')):
        for name, colour in (('logit_change', 'tab:red'), ('feature_change', 'tab:purple')):
            chosen = _untuned(rows, condition, WRONG)
            label = f'{name.split("_")[0]}s, window {condition.window_size}'
            values = [100 * getattr(row, name).mean for row in chosen]
            changes.plot([row.epochs for row in chosen], values, style, color=colour, marker='.', label=label)
    changes.set(title='change by the wrong pretrained window', ylabel='percent of the norm', ylim=(0, None))
    spread = shapes.twinx()
    for arm in ARMS:
        chosen = [row for row in _untuned(rows, start, arm) if row.bias_std is not None]
        epochs = [row.epochs for row in chosen]
        shapes.plot(epochs, [100 * row.bias_centre for row in chosen], color=COLOURS[arm], marker='.')
        spread.plot(epochs, [row.bias_std for row in chosen], color=COLOURS[arm], marker='.', linestyle='--')
    shapes.set(title='shape of the position bias', ylabel='variance within 3 tokens (percent, solid)', ylim=(0, 100))
    spread.set(ylabel='standard deviation (logits, dashed)', ylim=(0, None))
    for panel in axes:
        panel.set_xscale('log')
        ticks = sorted({row.epochs for row in rows})
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.set(xlabel='epochs of training')
        panel.grid(alpha=0.3)
    changes.legend(fontsize='small')
    _finish(figure, axes[0], out)


def plot_biases(measured: dict, settings: Settings, out: Path) -> None:
    """Write a PNG of the position bias over the distance, a line for every head of the first seed, a panel per arm.

    Of each head the mean within the window of training is subtracted, because a constant does not change attention.
    """
    start, last = training_condition(settings), max(step.epochs for step in measured)
    curves = {}
    for arm, by_seed in measured[Step(last, start)].items():
        values = by_seed[min(by_seed)]
        curves[arm] = values['bias_by_distance']
        if 'bias_by_distance_if_wrong' in values:
            curves[WRONG] = values['bias_by_distance_if_wrong']
    arms = [arm for arm in ARMS if arm in curves]
    figure, axes = plt.subplots(
        1, len(arms), figsize=(4.2 * len(arms), 4), layout='constrained', sharey=True, squeeze=False
    )
    for arm, panel in zip(arms, axes[0]):
        heads = curves[arm] - curves[arm][:, : start.window_size].mean(1, keepdims=True)
        panel.plot(heads.T, color=COLOURS[arm], linewidth=0.8, alpha=0.6)
        panel.plot(heads.mean(0), color='black', label='mean of the heads')
        panel.axvspan(0, start.window_size - 1, color='0.93', zorder=-1, label='distances of training')
        panel.set(title=arm, xlabel='distance (tokens)')
        panel.grid(alpha=0.3)
    axes[0, 0].set(ylabel='position bias (logits)')
    _finish(figure, axes[0, 0], out)


def _untuned(rows, condition, arm):
    """The rows of an arm at a condition without fine-tuning, by epochs."""
    return [row for row in rows if (row.condition, row.arm) == (condition, arm) and not row.finetuned]


def _draw(axes, places, intervals, arm):
    """Draw means with their intervals."""
    means, halves = [value.mean for value in intervals], [value.half for value in intervals]
    axes.errorbar(places, means, halves, color=COLOURS[arm], marker='o', markersize=4, capsize=3, label=arm)


def _finish(figure, axes, out):
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=len(labels))
    with whole(out) as partial:
        figure.savefig(partial, dpi=110, format='png')
    plt.close(figure)
