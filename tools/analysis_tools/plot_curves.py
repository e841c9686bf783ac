"""Plot the losses and the metrics of a training run, of any model.

The loss is bold; what it is the sum of has a colour for each kind of loss, and early stages of a cascade or layers of a
decoder are paler. The axis is logarithmic if the loss is much more than its parts. Metrics that are percentages are in
percent, and others have axes of their own.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from swinv2_tools import ending  # isort: split

import argparse
import json
import math
import re
from collections.abc import Iterable

import matplotlib

matplotlib.use('Agg')  # no display needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator

from swinv2_mm.writing import whole

UNNAMED = {'step', 'time', 'data_time'}  # of a validation, beside its metrics
LAYER = re.compile(r'(?:^|(?<=\.))([ds]\d+)\.')  # a layer of a decoder or a stage of a cascade, as in d0.loss_cls
RATES = 'AP|AR|PQ|SQ|RQ|MR|JI|IoU|Acc|Dice|Fscore|Precision|Recall|precision|recall'
RATE = re.compile(rf'(?:^|[/_])[am]?(?:{RATES})(?![a-z]{2})')
PERCENT = re.compile(
    'coco_panoptic/|IoU|Acc|Dice|Fscore|Precision|Recall'
)  # logged as such; mmdet logs others as 0 to 1
CLASS = re.compile('/.*_precision$')  # the AP of one class


def read_records(work_dir: str | Path) -> list[dict[str, float]]:
    """What a run logged, over all its resumptions: a record for each interval of training and for each validation.

    Args:
        work_dir (str): folder of the run, where mmengine leaves ``*/vis_data/scalars.json``.

    Raises:
        ValueError: the folder holds no log.
    """
    records = []
    for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # a killed run leaves its last line torn
                record = None
            if isinstance(record, dict) and 'step' in record:
                records.append(record)
            else:
                print(f'skipping a torn line of {path}', file=sys.stderr)
    if not any('loss' in record for record in records):
        raise ValueError(f'{work_dir} holds no training log (*/vis_data/scalars.json): name the work dir of a run')
    return records


def by_name(records: Iterable[dict[str, float]]) -> dict[str, dict[int, float]]:
    """Value by step, an iteration or an epoch, by name. The last value counts where a run repeats a step."""
    scalars = {}
    for record in records:
        for name, value in record.items():
            scalars.setdefault(name, {})[record['step']] = value
    return scalars


def read_scalars(work_dir: str | Path) -> dict[str, dict[int, float]]:
    """Everything that a run logged as a number, as `by_name` gives it; see `read_records`."""
    return by_name(read_records(work_dir))


def metric_names(records: list[dict[str, float]]) -> list[str]:
    """What validations log, in the order of the log."""
    validations = [record for record in records if 'loss' not in record]
    return [name for name in by_name(validations) if name not in UNNAMED]


def group_losses(names: Iterable[str]) -> dict[str, list[str]]:
    """Losses by kind: those of all layers of a decoder, or of all stages of a cascade, are of one kind.

    Layers and stages are in their order. The last layer of a decoder has no number, and comes last.
    """
    kinds = {}
    for name in names:
        if 'loss' in name and name != 'loss':  # what the hosts add up
            kinds.setdefault(LAYER.sub('', name), []).append(name)
    return {kind: sorted(names, key=layer_number) for kind, names in kinds.items()}


def layer_number(name: str) -> float:
    layer = LAYER.search(name)
    return int(layer[1][1:]) if layer else math.inf


def percent(name: str, values: dict[int, float]) -> dict[int, float] | None:
    """The values of a metric in percent, or None if it is no percentage."""
    if not RATE.search(name):
        return None
    scale = 1 if PERCENT.search(name) or max(values.values()) > 1 else 100
    # pycocotools gives -1 if there is no object, such as no small one
    return {step: math.nan if value == -1 else scale * value for step, value in values.items()}


def styles(number: int) -> list[dict]:
    """As many styles as there are lines, told apart as well as can be."""
    palette = plt.get_cmap('tab10' if number <= 10 else 'tab20').colors
    return [dict(color=palette[i % len(palette)], linestyle='--' if i >= len(palette) else '-') for i in range(number)]


def draw_line(axes: Axes, values: dict[int, float], **style) -> None:
    """Draw values in the order of the steps. A single one is a dot."""
    steps = sorted(values)
    style.setdefault('marker', 'o' if len(steps) == 1 else None)
    axes.plot(steps, [values[step] for step in steps], **style)


def draw_losses(axes: Axes, scalars: dict[str, dict[int, float]]) -> None:
    """Draw the loss in bold, and what it is the sum of: a colour for each kind, early layers and stages paler.

    Args:
        axes (Axes): where to draw.
        scalars (dict): what training logged, by name and step.
    """
    kinds = group_losses(scalars)
    draw_line(axes, scalars['loss'], label='loss', color='black', linewidth=2.5, zorder=3)
    for (kind, names), style in zip(kinds.items(), styles(len(kinds))):
        for i, name in enumerate(names, 1):
            draw_line(axes, scalars[name], alpha=0.15 + 0.85 * i / len(names), linewidth=1, **style)
        axes.lines[-1].set(linewidth=1.5, label=kind if names == [kind] else legend_entry(kind, names))
    axes.set(xlabel='iteration', ylabel='loss')
    largest = [max(values.values()) for name, values in scalars.items() if 'loss' in name and name != 'loss']
    if largest and max(scalars['loss'].values()) > 4 * max(largest):  # else the parts lie on the axis
        axes.set_yscale('log')
    else:
        axes.set_ylim(0, None)


def legend_entry(kind: str, names: list[str]) -> str:
    first, last = (LAYER.search(name) for name in (names[0], names[-1]))
    return f'{kind}: {first[1]} (pale) to {last[1] if last else "the last"}' if len(names) > 1 else names[0]


def draw_metrics(axes: Axes, metrics: dict[str, dict[int, float]], xlabel: str, ylabel: str) -> None:
    """Draw metrics, a colour for each; those of single classes are grey."""
    named = [name for name in metrics if not CLASS.search(name)]
    for name, style in zip(named, styles(len(named))):
        draw_line(axes, metrics[name], marker='o', markersize=4, label=name.replace('coco/', ''), **style)
    for i, name in enumerate(metrics.keys() - {*named}):
        draw_line(axes, metrics[name], color='0.7', linewidth=0.8, zorder=1, label='' if i else 'AP of each class')
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))


def plot(records: list[dict[str, float]], title: str, out: Path) -> None:
    """Write a PNG with losses on the left, metrics in percent beside them, and metrics that are no percentages."""
    scalars, names = by_name(records), metric_names(records)
    rates = {name: percent(name, scalars[name]) for name in names}
    others = {name: scalars[name] for name in names if rates[name] is None}
    rates = {name: values for name, values in rates.items() if values is not None}
    panels = [panel for panel in (('percent', rates), ('value', others)) if panel[1]]
    columns = 1 + len(panels)
    figure, all_axes = plt.subplots(1, columns, figsize=(7 * columns, 4.5), layout='constrained', squeeze=False)
    draw_losses(all_axes[0, 0], by_name(record for record in records if 'loss' in record))
    for axes, (ylabel, metrics) in zip(all_axes[0, 1:], panels):
        draw_metrics(axes, metrics, unit_of_steps(scalars, metrics), ylabel)
    for axes in all_axes[0]:
        axes.grid(alpha=0.3)
        steps = sorted({step for line in axes.lines for step in line.get_xdata()})
        apart = all(10 * (b - a) >= steps[-1] - steps[0] for a, b in zip(steps, steps[1:]))  # else ticks overlap
        axes.xaxis.set_major_locator(FixedLocator(steps) if len(steps) <= 6 and apart else MaxNLocator(integer=True))
        axes.legend(loc='center left', bbox_to_anchor=(1, 0.5), fontsize='small', frameon=False)
    figure.suptitle(title)
    with whole(out) as partial:
        figure.savefig(partial, dpi=120, format=out.suffix[1:] or 'png')
    plt.close(figure)


def unit_of_steps(scalars: dict[str, dict[int, float]], metrics: dict[str, dict[int, float]]) -> str:
    """What validations are counted in: mmengine logs the epoch or the iteration as their step."""
    epochs = scalars.get('epoch', {}).values()
    return 'epoch' if epochs and max(map(max, metrics.values())) <= max(epochs) else 'iteration'


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='example: python tools/analysis_tools/plot_curves.py work_dirs/demo --out curves.png',
    )
    parser.add_argument('work_dir', help='folder of the run')
    parser.add_argument('--out', type=Path, help='PNG to write (default: curves.png in the work dir)')
    args = parser.parse_args()
    out = args.out or Path(args.work_dir) / 'curves.png'
    try:
        plot(read_records(args.work_dir), Path(args.work_dir).resolve().name, out)
    except (OSError, ValueError) as error:
        print(f'{parser.prog}: error: {error}', file=sys.stderr)
        return 2
    print(f'wrote {out}')
    return 0


if __name__ == '__main__':
    sys.exit(ending.run(main))
