"""What swinv2_mm is for, from an empty machine to metrics and pictures, in minutes on two CPU cores.

Trains a small SwinV2 classifier at 64 pixels and window 4 on crops of drawn shapes, and saves it as the official
repository would. Then moves it into Mask R-CNN at 192 pixels and UPerNet at 128, both at window 8, trains and evaluates
them, and draws what they find.
"""

from __future__ import annotations

from swinv2_tools import ending  # isort: split

import argparse
import glob
import importlib
import multiprocessing.connection
import os
import runpy
import sys
import time
from pathlib import Path

from install import ROOT, ensure_environment

DETECTOR, SEGMENTOR = 'configs/demo/mask-rcnn_swinv2_shapes.py', 'configs/demo/upernet_swinv2_shapes.py'
EXPECTED = {'bbox AP50': 65, 'mIoU': 50}  # percent, with room for what another seed changes
HOSTS = ('mmdet.apis', 'mmseg.apis')  # importing them takes ten seconds
PICTURED = 'val2017/*[05].jpg'  # every fifth of the held-out scenes
ONE_BOX_EACH = ('--cfg-options', 'model.test_cfg.rcnn.nms.class_agnostic=True')  # AP ranks second guesses too
METRICS = {  # the printed metrics of each model, and the factors that make them percent
    DETECTOR: {
        'bbox AP': ('coco/bbox_mAP', 100),
        'bbox AP50': ('coco/bbox_mAP_50', 100),
        'segm AP': ('coco/segm_mAP', 100),
        'segm AP50': ('coco/segm_mAP_50', 100),
    },
    SEGMENTOR: {'mIoU': ('mIoU', 1)},
}


def run(tool: str, *args) -> None:
    """Run one of the tools of this folder. If it fails, the demo ends with its exit code."""
    run_side_by_side({(tool, *args): None})


def run_side_by_side(commands: dict[tuple, Path | None]) -> None:
    """Run tools of this folder at the same time, on equal shares of the cores. For small models that saves time.

    Each runs in a process of its own. That is a fork, which finds the hosts imported, unless there is a GPU: CUDA does
    not survive a fork. The first failure stops the others, and ends the demo with its exit code.

    Args:
        commands (dict): for each tool with its arguments, a file for what it prints, or None to show it.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // len(commands))
    processes = {}
    for (tool, *args), log in commands.items():
        command = [str(ROOT / 'tools' / tool), *map(str, args)]
        print(f'\n$ python tools/{tool} {" ".join(command[1:])}{f" &> {log} &" if log else ""}', flush=True)
        target = exec_script if has_gpu() else run_script
        process = multiprocessing.get_context('fork').Process(target=target, args=(command, threads, log))
        process.start()
        processes[process.sentinel] = process, log
    while processes:
        for sentinel in multiprocessing.connection.wait(processes):
            process, log = processes.pop(sentinel)
            process.join()
            if process.exitcode:
                for other, _ in processes.values():
                    other.terminate()
                    other.join()
                if log:
                    print(f'error: it failed, see the end of {log}', file=sys.stderr)
                sys.exit(process.exitcode)


def has_gpu() -> bool:
    import torch  # which only the environment has

    return torch.cuda.is_available()


def run_script(command: list[str], threads: int, log: Path | None) -> None:
    """Run a script of this folder and its arguments as the main module, in the repository."""
    import torch

    prepare(threads, log)
    torch.set_num_threads(threads)
    sys.argv = command
    runpy.run_path(command[0], run_name='__main__')


def exec_script(command: list[str], threads: int, log: Path | None) -> None:
    """The same as `run_script`, in a fresh interpreter that takes the place of this process."""
    prepare(threads, log)
    os.execv(sys.executable, [sys.executable, *command])


def prepare(threads: int, log: Path | None) -> None:
    """Make this process work in the repository, on some threads, and print to ``log`` if that is given."""
    os.chdir(ROOT)
    os.environ['OMP_NUM_THREADS'] = str(threads)
    os.environ[ending.SILENT] = '1'  # if a signal ends a tool, the demo prints the line
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open('a') as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)


def train_and_infer(data_root: Path, folder: Path, images: str, *flags) -> dict[str, float]:
    """Train both models side by side, or continue the runs that are there, and draw losses, metrics and predictions.

    ``images`` is a pattern of what to predict on.

    Returns:
        dict: the metrics of the last validations in percent.
    """
    work_dirs = {DETECTOR: folder / 'mask_rcnn', SEGMENTOR: folder / 'upernet'}
    data_roots = {DETECTOR: data_root, SEGMENTOR: data_root / 'ade'}
    logs = {DETECTOR: None, SEGMENTOR: folder / 'upernet.log'}
    trainings = {}
    for config, work_dir in work_dirs.items():
        resume = ['--resume'] if (work_dir / 'last_checkpoint').exists() else []
        if resume:
            print(f'\n{work_dir} holds a run, which is continued unless it is finished: delete it to start anew')
        paths = ('--data-root', data_roots[config], '--work-dir', work_dir)
        trainings[('train.py', config, *paths, *resume, *flags)] = logs[config]
    run_side_by_side(trainings)
    metrics = {}
    for config, work_dir in work_dirs.items():
        checkpoint = (work_dir / 'last_checkpoint').read_text().strip()
        best = ONE_BOX_EACH if config == DETECTOR else ()
        run('infer.py', config, checkpoint, images, '--out', work_dir / 'predictions', '--score-thr', 0.5, *best)
        run('analysis_tools/plot_curves.py', work_dir)
        metrics.update(read_metrics(config, work_dir))
    return metrics


def read_metrics(config: str, work_dir: Path) -> dict[str, float]:
    """The metrics of the last validation, in percent, by their names in the table."""
    from analysis_tools.plot_curves import read_scalars  # it imports matplotlib, which only the environment has

    scalars = read_scalars(work_dir)
    end = max(scalars['loss'])
    if any(end not in scalars.get(name, ()) for name, _ in METRICS[config].values()):
        sys.exit(f'error: {work_dir} holds a run that was stopped in its last validation: delete it and start again')
    return {label: factor * scalars[name][end] for label, (name, factor) in METRICS[config].items()}


def table(results: dict[str, dict[str, float]]) -> str:
    """A line for each metric, a column for each start."""
    lines = [f'{"percent":<16} {" ".join(f"{start:>16}" for start in results)}']
    for label in results['transferred']:
        lines.append(f'{label:<16} {" ".join(f"{metrics[label]:>16.1f}" for metrics in results.values())}')
    return '\n'.join(lines)


def shortfall(metrics: dict[str, float]) -> str | None:
    """Which metric of the transferred models is less than it should be, if any."""
    for label, expected in EXPECTED.items():
        if metrics[label] < expected:
            return f'error: {label} is {metrics[label]:.1f}, and {expected} or more is expected'
    return None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog='example: python3 tools/demo.py --compare --seed 1')
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=Path('work_dirs/demo'),
        help='each seed gets a folder there (default: %(default)s)',
    )
    parser.add_argument('--data-root', type=Path, default=Path('data/shapes'), help='default: %(default)s')
    parser.add_argument('--seed', type=int, default=0, help='seed of all training (default: %(default)s)')
    parser.add_argument(
        '--compare',
        action='store_true',
        help='also train both from scratch, and with a wrong pretrained window for the position bias (three times '
        'as long)',
    )
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    ensure_environment()
    started = time.monotonic()
    if not has_gpu():
        print('Importing mmdet and mmseg', flush=True)
        for host in HOSTS:
            importlib.import_module(host)
    work_dir, data_root = args.work_dir.resolve() / f'seed_{args.seed}', args.data_root.resolve()
    seed = ('--seed', args.seed)
    classifier = work_dir / 'swinv2_shapes_patch4_window4_64.pth'

    run('misc/draw_dataset.py', data_root, '--train', 400, '--val', 60)
    if not classifier.exists():
        run('misc/train_classifier.py', DETECTOR, classifier, '--data-root', data_root, *seed)
    run('model_converters/inspect_checkpoint.py', classifier)
    run(
        'analysis_tools/plot_position_bias.py',
        classifier,
        '--window',
        8,
        '--stage',
        2,
        '--out',
        work_dir / 'position_bias.png',
    )

    starts = {'transferred': ('--checkpoint', classifier)}
    if args.compare:
        starts['from scratch'] = ('--checkpoint', 'none')
        # 8 is the new window, not the one that the bias was trained with
        starts['wrong window'] = (
            *starts['transferred'],
            '--cfg-options',
            'model.backbone.pretrained_window_sizes=8',
        )
    results, images = {}, os.path.join(glob.escape(str(data_root)), PICTURED)
    for start, flags in starts.items():
        folder = work_dir / start.replace(' ', '_')
        results[start] = train_and_infer(data_root, folder, images, *seed, *flags)

    print(f'\n{table(results)}')
    print(f'\n{(time.monotonic() - started) / 60:.1f} minutes; in {work_dir}:')
    print('transferred/*/predictions/overlays: what was found in some of the held-out scenes')
    print('transferred/*/curves.png: losses and metrics')
    print('position_bias.png: the bias of a head at window 4, and moved to window 8')
    sys.exit(shortfall(results['transferred']))


if __name__ == '__main__':
    ending.run(main)
