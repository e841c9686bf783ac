"""Train a small SwinV2 Mask R-CNN on drawn shapes, from an empty machine to metrics and pictures.

Sets up the environment, draws the data, trains for a few minutes on two CPU cores, evaluates and draws.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from install import ensure_environment

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / 'configs/demo/mask-rcnn_swinv2_shapes.py'


def run(tool: str, *args) -> None:
    """Run one of the tools beside this file; a failure ends the demo with the tool's exit code."""
    command = [sys.executable, str(ROOT / 'tools' / tool), *map(str, args)]
    print(f'\n$ python tools/{tool} {" ".join(map(str, args))}', flush=True)
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        sys.exit(code)


def read_metrics(work_dir: Path) -> dict[str, float]:
    """The metrics of the newest evaluation in a work dir, as mmengine leaves them in ``TIME/TIME.json``."""
    newest = max(work_dir.glob('[0-9]*/[0-9]*.json'), key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog='example: python3 tools/demo.py')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'), help='default: %(default)s')
    parser.add_argument('--data-root', type=Path, default=Path('data/shapes'), help='default: %(default)s')
    args = parser.parse_args()
    ensure_environment()
    work_dir, data_root = args.work_dir.resolve(), args.data_root.resolve()

    run('draw_dataset.py', data_root, '--train', 400, '--val', 60)
    resume = ['--resume'] if (work_dir / 'last_checkpoint').exists() else []
    if resume:
        print(
            f'\n{work_dir} holds a run, which is continued or, if it was finished, evaluated: delete it to start anew'
        )
    run('train.py', CONFIG, '--data-root', data_root, '--work-dir', work_dir, '--seed', 0, *resume)
    checkpoint = (work_dir / 'last_checkpoint').read_text().strip()
    pictures = work_dir / 'pictures'
    run('test.py', CONFIG, checkpoint, '--data-root', data_root, '--work-dir', work_dir, '--show-dir', pictures)
    run('plot_curves.py', work_dir)

    metrics = read_metrics(work_dir)
    print(f'\n{"COCO metric":<12} {"bbox":>6} {"segm":>6}')
    for label, name in {'AP': 'mAP', 'AP50': 'mAP_50', 'AP75': 'mAP_75'}.items():
        print(f'{label:<12} {metrics[f"coco/bbox_{name}"]:>6.3f} {metrics[f"coco/segm_{name}"]:>6.3f}')
    print(f'\npredictions beside ground truth: {pictures}\nloss and AP curves: {work_dir / "curves.png"}')


if __name__ == '__main__':
    main()
