"""Plots of a study of position biases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use('Agg')  # no display needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from swinv2_mm.writing import whole
from swinv2_tools.intervals import Interval
from swinv2_tools.transfer_plan import (
    CENTRE,
    Settings,
    Step,
    canvases,
    is_moved,
    larger_images,
    training_condition,
)
from swinv2_tools.transfer_report import ARMS, REFERENCE, WRONG, Row, summarise

COLOURS = dict(zip(ARMS, ('tab:orange', 'tab:green', 'tab:blue', 'tab:red')))


def plot_windows(rows: Sequence[Row], epochs: int, settings: Settings) -> Figure | None:
    """Plot top-1 over the window, and below the difference in cross-entropy from log_cpb, a line per arm.

    A dashed line shows log_cpb on the same images in windows as in training.

    Returns:
        Figure: None if nothing but the condition of training was measured after these epochs.
    """
    rows = [row for row in rows if row.epochs == epochs]
    start, panels = training_condition(settings), []
    for title, conditions in (('larger images', larger_images(settings)), ('larger canvases', canvases(settings))):
        moved = [start, *(condition for condition in conditions if is_moved(condition, start))]
        for finetuned in (False, True):
            chosen = [row for row in rows if row.condition in moved and row.finetuned == finetuned]
            if any(row.condition != start for row in chosen):
                panels.append((f'{title}{", fine-tuned" * finetuned}', moved, chosen))
    if not panels:
        return None
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
        _draw_kept(upper, chosen, rows, moved)
        upper.set(title=title)
        lower.set(xlabel='window (tokens)')
        lower.axhline(0, color=COLOURS[REFERENCE], linewidth=1)
        for panel in (upper, lower):
            panel.set_xticks([condition.window_size for condition in moved])
            panel.grid(alpha=0.3)
    axes[0, 0].set(ylabel='top-1 (percent)')
    axes[1, 0].set(ylabel=f'cross-entropy minus that of {REFERENCE} (nats)')
    return _with_legend(figure, axes[0, 0])


def _draw_kept(axes, chosen, rows, moved):
    """Draw top-1 of log_cpb where the chosen rows are, but in windows as in training, those of the first condition."""
    tuned = chosen[0].finetuned
    top1 = {row.condition: row.top1.mean for row in rows if row.arm == REFERENCE and row.finetuned == tuned}
    points = [
        (condition.window_size, top1.get(condition._replace(window_size=moved[0].window_size), np.nan))
        for condition in moved
    ]
    axes.plot(*zip(*points), '--', color='0.4', label=f'{REFERENCE}, windows as in training')


def plot_epochs(measured: dict, settings: Settings) -> Figure | None:
    """Plot over the epochs: differences where window and image grow, changes by the wrong window, the bias.

    Only seeds that were measured after each of the epochs count.

    Returns:
        Figure: None if there is one epoch or no such seed.
    """
    start = training_condition(settings)
    all_epochs = sorted({step.epochs for step in measured})
    seeds = set.intersection(
        *(set(by_seed) for epochs in all_epochs for by_seed in measured.get(Step(epochs, start), {0: ()}).values())
    )
    if len(all_epochs) < 2 or not seeds:
        return None
    whole_runs = {
        step: {arm: {seed: by_seed[seed] for seed in seeds & by_seed.keys()} for arm, by_seed in arms.items()}
        for step, arms in measured.items()
    }
    whole_runs = {step: {arm: runs for arm, runs in arms.items() if runs} for step, arms in whole_runs.items()}
    rows = [row for row in summarise(whole_runs, start) if not row.finetuned]
    early = {row.condition for row in rows if row.epochs == all_epochs[0]}
    moved = [c for c in (*larger_images(settings), *canvases(settings)) if c in early and is_moved(c, start)]
    columns = max(len(moved), 4)
    figure, axes = plt.subplots(2, columns, figsize=(3.6 * columns, 7.5), layout='constrained')
    for condition, panel in zip(moved, axes[0]):
        _draw_differences(panel, [row for row in rows if row.condition == condition])
    axes[0, 0].set(ylabel=f'cross-entropy minus that of {REFERENCE} (nats)')
    _draw_changes(axes[1, :2], rows, moved)
    _draw_shapes(axes[1, 2:4], [row for row in rows if row.condition == start], start.window_size)
    for panel in axes.flat:
        if not panel.has_data():
            panel.remove()
            continue
        panel.set_xscale('log')
        panel.set_xticks(all_epochs, [str(epochs) for epochs in all_epochs])
        panel.minorticks_off()
        panel.set(xlabel='epochs of training')
        panel.grid(alpha=0.3)
    figure.suptitle(f'seed{"s" * (len(seeds) > 1)} {", ".join(map(str, sorted(seeds)))}')
    arms = [arm for arm in ARMS if any(row.arm == arm for row in rows)]
    handles = [Line2D([], [], color=COLOURS[arm], marker='o', markersize=4, label=arm) for arm in arms]
    figure.legend(handles=handles, loc='outside lower center', ncols=len(arms))
    return figure


def _draw_differences(axes, rows):
    """Draw the differences in cross-entropy of rows of one condition."""
    for arm in (arm for arm in ARMS if arm != REFERENCE):
        chosen = [row for row in rows if row.arm == arm and row.cross_entropy_difference]
        if chosen:
            _draw(axes, [row.epochs for row in chosen], [row.cross_entropy_difference for row in chosen], arm)
    if axes.has_data():
        axes.axhline(0, color=COLOURS[REFERENCE], linewidth=1)
    axes.set(title=_name(rows[0].condition))


def _draw_changes(panels, rows, conditions):
    """Draw how far the wrong window changes logits and features, in a panel each, a line for each condition."""
    shades = plt.get_cmap('viridis')(np.linspace(0, 0.9, len(conditions)))
    rows = [row for row in rows if row.arm == WRONG]
    for panel, name in zip(panels, ('logits', 'features')):
        for condition, shade in zip(conditions, shades):
            chosen = [row for row in rows if row.condition == condition]
            values = [100 * getattr(row, f'{name[:-1]}_change').mean for row in chosen]
            if chosen:
                panel.plot([row.epochs for row in chosen], values, color=shade, marker='.', label=_name(condition))
        panel.set(title=f'change of {name}\nby the wrong pretrained window', ylabel='percent of the norm')
        if panel.has_data():
            panel.set(ylim=(0, 1.05 * panel.dataLim.y1))
            panel.legend(fontsize='x-small')


def _draw_shapes(panels, rows, window):
    """Draw how large the position bias is, and how much of it is at its centre, in the window of training."""
    spread, centre = panels
    for arm in ARMS:
        chosen = [row for row in rows if row.arm == arm and row.bias_std is not None]
        epochs = [row.epochs for row in chosen]
        spread.plot(epochs, [row.bias_std for row in chosen], color=COLOURS[arm], marker='.')
        centre.plot(epochs, [100 * row.bias_centre for row in chosen], color=COLOURS[arm], marker='.')
    spread.set(title='spread of the position bias', ylabel='standard deviation (logits)')
    spread.set(ylim=(0, 1.05 * spread.dataLim.y1))
    even = 100 * ((2 * CENTRE + 1) / (2 * window - 1)) ** 2
    centre.axhline(even, color='0.6', linewidth=1, label='if it were spread evenly')
    centre.legend(fontsize='x-small')
    centre.set(title=f'position bias within {CENTRE} tokens', ylabel='percent of its variance', ylim=(0, 100))


def _name(condition):
    photos = f'{condition.grid} x {condition.grid} photos' if condition.grid > 1 else f'{condition.image_size} pixels'
    return f'{photos}, window {condition.window_size}'


def plot_biases(measured: dict, settings: Settings) -> Figure | None:
    """Plot the position bias over the distance, a line for every head of the first seed, a panel per arm.

    Of each head the mean within the window of training is subtracted, because a constant does not change attention.

    Returns:
        Figure: None if the condition of training is not measured after the last epoch.
    """
    start, last = training_condition(settings), max(step.epochs for step in measured)
    curves = {}
    for arm, by_seed in measured.get(Step(last, start), {}).items():
        values = by_seed[min(by_seed)]
        curves[arm] = values['bias_by_distance']
        if 'bias_by_distance_if_wrong' in values:
            curves[WRONG] = values['bias_by_distance_if_wrong']
    arms = [arm for arm in ARMS if arm in curves]
    if not arms:
        return None
    figure, axes = plt.subplots(
        1, len(arms), figsize=(4.2 * len(arms), 4), layout='constrained', sharey=True, squeeze=False
    )
    for arm, panel in zip(arms, axes[0]):
        heads = curves[arm] - curves[arm][:, : start.window_size].mean(1, keepdims=True)
        panel.plot(heads.T, color=COLOURS[arm], linewidth=0.8, alpha=0.6)
        panel.plot(heads.mean(0), color='black', label='mean of the heads')
        panel.axvspan(0, start.window_size - 1, color='0.93', zorder=-1, label='distances of training')
        panel.set(title=f'{arm}, {last} epochs', xlabel='distance (tokens)')
        panel.grid(alpha=0.3)
    axes[0, 0].set(ylabel='position bias (logits)')
    return _with_legend(figure, axes[0, 0])


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG and close it."""
    with whole(path) as partial:
        figure.savefig(partial, dpi=110, format='png')
    plt.close(figure)


def _draw(axes, places, intervals, arm):
    """Draw means with their intervals."""
    means, halves = [value.mean for value in intervals], [value.half for value in intervals]
    axes.errorbar(places, means, halves, color=COLOURS[arm], marker='o', markersize=4, capsize=3, label=arm)


def _with_legend(figure, axes):
    """The figure, with the legend of one of its axes below."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc='outside lower center', ncols=len(labels))
    return figure
