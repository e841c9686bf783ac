"""Plot the loss and the metrics of a training run against its iterations."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from swinv2_tools import ending  # isort: split

import argparse
import json

import matplotlib

matplotlib.use('Agg')  # no display needed
import matplotlib.pyplot as plt

from swinv2_mm.writing import whole

METRICS = ('coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/segm_mAP', 'coco/segm_mAP_50', 'mIoU', 'mAcc')


def read_scalars(work_dir: str | Path) -> dict[str, dict[int, float]]:
    """Everything that a run logged as a number, over all its resumptions.

    Args:
        work_dir (str): folder of the run, where mmengine leaves ``*/vis_data/scalars.json``.

    Returns:
        dict[str, dict[int, float]]: value by step, an iteration or an epoch, by name.

    Raises:
        ValueError: the folder holds no log.
    """
    scalars = {}
    for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # a killed run leaves its last line torn
                print(f'skipping a torn line of {path}', file=sys.stderr)
                continue
            for name, value in record.items():
                scalars.setdefault(name, {})[record['step']] = value
    if 'loss' not in scalars:
        raise ValueError(f'{work_dir} holds no training log (*/vis_data/scalars.json): name the work dir of a run')
    return scalars


def plot(scalars: dict[str, dict[int, float]], out: Path) -> None:
    """Write a PNG with the losses on the left and the metrics in percent on the right."""
    losses = [name for name in scalars if name.startswith(('loss', 'decode.loss', 'aux.loss'))]
    metrics = [name for name in METRICS if name in scalars]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
    for name in losses:
        left.plot(scalars[name].keys(), scalars[name].values(), label=name, linewidth=2 if name == 'loss' else 1)
    left.set(xlabel='iteration', ylabel='loss', ylim=(0, None))
    for name in metrics:
        scale = 100 if name.startswith('coco/') else 1  # mmseg gives percent
        values = [scale * value for value in scalars[name].values()]
        right.plot(scalars[name].keys(), values, marker='o', label=name.replace('coco/', ''))
    right.set(xlabel='step of validation', ylabel='percent', ylim=(0, 100))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    with whole(out) as partial:
        figure.savefig(partial, dpi=120, format=out.suffix[1:] or 'png')
    plt.close(figure)


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
        plot(read_scalars(args.work_dir), out)
    except (OSError, ValueError) as error:
        print(f'{parser.prog}: error: {error}', file=sys.stderr)
        return 2
    print(f'wrote {out}')
    return 0


if __name__ == '__main__':
    sys.exit(ending.run(main))
