"""Measure on photos what moving a SwinV2 to larger images and windows costs or gains, for each kind of position bias.

Trains small classifiers at a low resolution and a small window, with the same initial weights, images, batches and
augmentation for all kinds. Then measures them, without further training, on larger images and on canvases of several
photos, with larger windows and with the old one, and with the pretrained window wrongly set to the new one; then again
after a short fine-tuning there. Goes on where an earlier call with the same --out ended.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from swinv2_tools import ending  # isort: split

import argparse
import logging
import os

import torch
from mmengine.logging import MMLogger
from swinv2_tools.jobs import Job, run_jobs
from swinv2_tools.kept_settings import keep
from swinv2_tools.photos import Photos, read_photos
from swinv2_tools.progress import Progress
from swinv2_tools.transfer_plan import Run, Settings, Step, Work, plan, training_condition, windows_at
from swinv2_tools.transfer_plots import plot_biases, plot_epochs, plot_windows, save
from swinv2_tools.transfer_report import read_measurements, summarise, table, write_csv
from swinv2_tools.transfer_steps import carry_out

from swinv2_mm.arch import parse_arch
from swinv2_mm.engine.launch import bad_input
from swinv2_mm.position_bias import POSITION_BIASES
from swinv2_mm.writing import check_folder, whole

LEAST = dict(
    **dict(epochs=1, curve=1, seeds=0, jobs=1, photo_size=1, image_size=1, window_size=2, patch_size=1, batch_size=1),
    **dict(ratios=1, grids=2, finetune_iters=0, lr=0, finetune_lr=0, mlp_lr_mult=0, table_lr_mult=0),
)
MOST = dict(seeds=2**32 - 1)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example: python tools/analysis_tools/compare_position_biases.py data/photos --out work_dirs/biases',
    )
    parser.add_argument('data_root', type=os.path.abspath, help='folder with photos in train/CLASS and val/CLASS')
    parser.add_argument('--out', type=Path, required=True, help='folder for weights, measurements, tables and plots')
    parser.add_argument('--position-biases', nargs='+', default=list(POSITION_BIASES), choices=list(POSITION_BIASES))
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], help='default: 0 1 2')
    parser.add_argument('--epochs', type=int, default=20, help='of training from scratch (default: %(default)s)')
    parser.add_argument(
        '--curve',
        nargs='*',
        type=int,
        default=[5, 10],
        help='epochs after which canvases and images of up to twice the size are measured too (default: 5 10)',
    )
    parser.add_argument(
        '--ratios', nargs='*', type=float, default=[1.5, 2, 3], help='of image and window (default: 1.5 2 3)'
    )
    parser.add_argument(
        '--grids', nargs='*', type=int, default=[2, 3, 4], help='photos per side of a canvas (default: 2 3 4)'
    )
    parser.add_argument('--finetune-iters', type=int, default=20, help='0: no fine-tuning (default: %(default)s)')
    parser.add_argument('--finetune-lr', type=float, default=5e-4, help='at its start (default: %(default)s)')
    parser.add_argument(
        '--photo-size',
        type=int,
        default=64,
        help='pixels; photos are read as squares of this size (default: %(default)s)',
    )
    parser.add_argument('--image-size', type=int, default=32, help='pixels, in training (default: %(default)s)')
    parser.add_argument('--window-size', type=int, default=8, help='tokens, in training (default: %(default)s)')
    parser.add_argument('--patch-size', type=int, default=2, help='pixels (default: %(default)s)')
    parser.add_argument('--embed-dims', type=int, default=32, help='channels of the first stage (default: %(default)s)')
    parser.add_argument('--depths', nargs='+', type=int, default=[1, 3], help='blocks per stage (default: 1 3)')
    parser.add_argument('--num-heads', nargs='+', type=int, default=[2, 4], help='per stage (default: 2 4)')
    parser.add_argument('--batch-size', type=int, default=64, help='photos (default: %(default)s)')
    parser.add_argument('--lr', type=float, default=2e-3, help='of AdamW (default: %(default)s)')
    for name, what in (('mlp', 'position MLP of linear_cpb and log_cpb'), ('table', 'learned table of parameterized')):
        parser.add_argument(
            f'--{name}-lr-mult',
            type=float,
            default=1,
            help=f'learning rate of the {what} over --lr (default: %(default)s)',
        )
    parser.add_argument(
        '--jobs', type=int, default=1, help='runs at once, each on one core or all on one GPU (default: 1)'
    )
    parser.add_argument(
        '--minutes', type=float, help='end after so long, and report what is measured (default: no limit)'
    )
    parser.add_argument('--device', choices=('cpu', 'cuda'), help='default: cuda if there is one')
    parser.add_argument('--run', nargs=2, help=argparse.SUPPRESS)  # kind and seed: do that run alone, without a report
    return parser.parse_args(argv)


def read_settings(args: argparse.Namespace) -> Settings:
    """The settings of a study, checked.

    Raises:
        ValueError: one is out of range, or does not fit another.
    """
    for name, least in LEAST.items():
        given, most = getattr(args, name), MOST.get(name, sys.float_info.max)
        for value in given if isinstance(given, list) else [given]:
            if not least <= value <= most:
                limits = f'at least {least}' if value < least else 'finite' if name not in MOST else f'at most {most}'
                raise ValueError(f'--{name.replace("_", "-")} must be {limits}, got {value:g}')
    given = {name: getattr(args, name) for name in Settings._fields}
    settings = Settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
    parse_arch(dict(embed_dims=settings.embed_dims, depths=settings.depths, num_heads=settings.num_heads))
    stride = settings.patch_size * 2 ** (len(settings.depths) - 1)
    sizes = {settings.image_size, *(round(ratio * settings.image_size) for ratio in settings.ratios)}
    for size in sorted(sizes):
        if size % stride:
            raise ValueError(
                f'images of {size} pixels do not fill a map of stride {stride}: change --image-size or --ratios'
            )
    if windows_at(settings, training_condition(settings))[0] < settings.window_size:
        side = settings.image_size // settings.patch_size
        raise ValueError(f'--window-size {settings.window_size} is larger than the map of {side} x {side} tokens')
    grid = max(settings.grids, default=1)
    if grid**2 > settings.batch_size:
        raise ValueError(f'--batch-size {settings.batch_size} does not fill a canvas of {grid} x {grid} photos')
    return settings


def check_photos(photos: dict[str, Photos], settings: Settings) -> None:
    """Check that the splits have the same classes and enough photos, and say how many photos were enlarged.

    Raises:
        ValueError: they have not.
    """
    train, val = photos['train'], photos['val']
    if train.classes != val.classes:
        name = sorted(set(train.classes) ^ set(val.classes))[0]
        raise ValueError(f'class {name} has no folder in both train and val: add it, or remove the other one')
    if len(train.labels) < settings.batch_size:
        raise ValueError(f'--batch-size {settings.batch_size} is more than the {len(train.labels)} photos of train')
    enlarged = train.enlarged + val.enlarged
    if enlarged:
        print(f'{enlarged} photos are smaller than --photo-size {settings.photo_size} and were enlarged to it')


def carry_out_run(run: Run, steps: list[Step], settings: Settings, folder: Path, device: str) -> None:
    """Do the steps of a run that are left."""
    MMLogger.get_instance('study', log_level=logging.ERROR)  # silences the report of loading, the same every time
    folder.mkdir(parents=True, exist_ok=True)
    photos = {split: read_photos(Path(settings.data_root), split, settings.photo_size) for split in ('train', 'val')}
    for step in steps:
        if not step.file(folder).exists():
            carry_out(step, settings, run, folder, photos, device)


def job_of(run: Run, out: Path) -> Job:
    """The job of a run: this tool with --run."""
    command = [str(Path(__file__).resolve()), *sys.argv[1:], '--run', run.position_bias, str(run.seed)]
    return Job(f'the run of {run.position_bias} with seed {run.seed}', command, run.folder(out) / 'run.log')


def report(out: Path, settings: Settings) -> None:
    """Write tables and plots of all that was measured, and print the table of the last epoch."""
    measured = read_measurements(out)
    if not measured:
        raise ValueError(f'nothing is measured in {out} yet: allow more --minutes')
    rows = summarise(measured, training_condition(settings))
    tables = {epochs: table(rows, epochs, settings.photo_size) for epochs in sorted({row.epochs for row in rows})}
    print(f'\n{tables[max(tables)]}\n')
    write_csv(rows, out / 'results.csv', settings.photo_size)
    with whole(out / 'results.md') as partial:
        partial.write_text('\n\n'.join(tables.values()) + '\n')
    plots = {f'windows_after_{epochs}_epochs.png': plot_windows(rows, epochs, settings) for epochs in tables}
    plots.update({'epochs.png': plot_epochs(measured, settings), 'biases.png': plot_biases(measured, settings)})
    for name, figure in plots.items():
        if figure is not None:
            save(figure, out / name)
    print(f'wrote tables (results.md, results.csv) and plots (*.png) to {out}')


def main() -> int:
    args = parse_args()
    try:
        settings = read_settings(args)
        steps = plan(settings, args.epochs, args.curve)
        device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
        if args.run:
            run = Run(args.run[0], int(args.run[1]))
            carry_out_run(run, steps, settings, run.folder(args.out), device)
            return 0
        photos = {split: read_photos(Path(args.data_root), split, args.photo_size) for split in ('train', 'val')}
        check_photos(photos, settings)
        check_folder(args.out, '--out')
        keep(settings._asdict(), args.out / 'settings.json', free=('data_root', 'ratios', 'grids'))
        if device == 'cpu':
            os.environ['CUDA_VISIBLE_DEVICES'] = ''  # mmengine's runner takes a GPU wherever it sees one
        runs = [Run(kind, seed) for seed in dict.fromkeys(args.seeds) for kind in dict.fromkeys(args.position_biases)]
        work = Work(settings, runs, steps, {split: len(part.labels) for split, part in photos.items()}, args.out)
        left = [run for run in runs if not all(step.file(run.folder(args.out)).exists() for step in steps)]
        limit = None if args.minutes is None else 60 * args.minutes
        with Progress(work.total(), work.done()) as progress:
            run_jobs([job_of(run, args.out) for run in left], args.jobs, lambda: progress.show(work.done()), limit)
        report(args.out, settings)
    except (OSError, ValueError) as error:
        return bad_input(error)
    return 0


if __name__ == '__main__':
    sys.exit(ending.run(main))
