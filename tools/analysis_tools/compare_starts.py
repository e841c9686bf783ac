"""Train a detector or segmentor from several starts with several seeds, and compare losses and metrics.

A start is a checkpoint for the backbone and any settings of the config. Goes on where an earlier call with the same
--out ended.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from swinv2_tools import ending  # isort: split

import argparse
import csv
import json
import re
import subprocess
from typing import NamedTuple

import matplotlib

matplotlib.use('Agg')  # no display needed
import matplotlib.pyplot as plt
import numpy as np
from analysis_tools.plot_curves import read_scalars
from swinv2_tools.intervals import Interval, interval
from swinv2_tools.jobs import Job, run_jobs
from swinv2_tools.kept_settings import keep
from swinv2_tools.progress import Progress
from swinv2_tools.startup import check_config, read_config

from swinv2_mm.engine import launch
from swinv2_mm.engine.launch import bad_input
from swinv2_mm.writing import check_folder, whole

TOOLS = Path(__file__).resolve().parents[1]
RESULT = 'result.json'  # in the folder of a run that is done


class Start(NamedTuple):
    """A name, a checkpoint for the backbone with {seed} in its path or none, and settings of the config."""

    name: str
    checkpoint: str
    settings: tuple[str, ...]

    def folder(self, out: Path, seed: int) -> Path:
        return out / self.name / f'seed_{seed}'


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example: python tools/analysis_tools/compare_starts.py configs/upernet_swinv2.py --out work_dirs/seg '
        '--start scratch none --start transferred swinv2_tiny_patch4_window8_256.pth',
    )
    parser.add_argument('config', help='config file of a detector (mmdet) or segmentor (mmseg)')
    parser.add_argument('--out', type=Path, required=True, help='folder for the runs, the table and the plot')
    parser.add_argument(
        '--start',
        nargs='+',
        action='append',
        required=True,
        metavar=('NAME CHECKPOINT', 'KEY=VALUE'),
        help='checkpoint for the backbone, which may have {seed} in its path, or none (from scratch); and settings of '
        'the config, as for --cfg-options. Others are compared with the first start',
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], help='default: 0 1 2')
    parser.add_argument('--data-root', help='folder of the data set (default: that of the config)')
    parser.add_argument('--jobs', type=int, default=1, help='runs at once (default: 1)')
    parser.add_argument('--run', nargs=2, help=argparse.SUPPRESS)  # start and seed: do that run alone
    return parser.parse_args(argv)


def read_starts(given: list[list[str]]) -> list[Start]:
    """The starts of the command line.

    Raises:
        ValueError: one has no checkpoint or no valid setting, or two have the same name.
    """
    starts = []
    for words in given:
        if len(words) < 2:
            raise ValueError(f'--start {words[0]} has no checkpoint: add a path, or none to train from scratch')
        name, checkpoint, *settings = words
        if not re.fullmatch(r'\w[\w.-]*', name) or name in {start.name for start in starts}:
            raise ValueError(f'--start {name} must have a name of its own that can name a folder')
        for setting in settings:
            if '=' not in setting:
                raise ValueError(f'--start {name} has {setting!r}, which is no setting: write KEY=VALUE')
        starts.append(Start(name, checkpoint, tuple(settings)))
    return starts


def check_start(args: argparse.Namespace, start: Start) -> None:
    """Check, before anything is trained, that a start has its files and that the config takes its settings.

    Raises:
        ValueError: a file is missing, or a setting does not fit.
    """
    for seed in args.seeds:
        path = start.checkpoint.replace('{seed}', str(seed))
        if path.lower() != 'none' and '://' not in path and not Path(path).expanduser().is_file():
            raise ValueError(f'--start {start.name}: there is no checkpoint {path}')
    parser = argparse.ArgumentParser()
    parser.add_argument('config')
    parser.add_argument('--work-dir')
    launch.add_arguments(parser)
    flags = parser.parse_args([args.config, *shared_flags(args, start)])
    check_config(read_config(flags), flags, ('train',))


def train_and_test(args: argparse.Namespace, start: Start, seed: int) -> int:
    """Train from a start, or continue that, then test, and write the last loss and the metrics as ``result.json``.

    Returns:
        int: the exit code of the tool that failed, else 0.
    """
    folder = start.folder(args.out, seed)
    shared = shared_flags(args, start)
    resume = ['--resume'] if (folder / 'last_checkpoint').exists() else []
    begin = ['--checkpoint', start.checkpoint.replace('{seed}', str(seed)), '--seed', str(seed)]
    code = run_tool('train.py', args.config, '--work-dir', folder, *resume, *begin, *shared)
    if not code and launch.load_config(args.config).get('test_cfg'):
        checkpoint = (folder / 'last_checkpoint').read_text().strip()
        code = run_tool('test.py', args.config, checkpoint, '--work-dir', folder / 'test', *shared)
    if not code:
        with whole(folder / RESULT) as partial:
            partial.write_text(json.dumps(read_result(folder), indent=1) + '\n')
    return code


def shared_flags(args: argparse.Namespace, start: Start) -> list[str]:
    """The flags of training and testing alike."""
    data_root = ['--data-root', args.data_root] if args.data_root else []
    return [*data_root, *(['--cfg-options', *start.settings] if start.settings else [])]


def run_tool(name: str, *args) -> int:
    """Run a tool of this repository. Returns its exit code."""
    return subprocess.run([sys.executable, str(TOOLS / name), *map(str, args)]).returncode


def read_result(folder: Path) -> dict[str, float]:
    """The loss, its parts and the metrics that a run logged last, and those of its test.

    The parts show what their sum can hide: of a detector, one may fall while another rises.

    Returns:
        dict[str, float]: ``loss`` first, metrics of validation as ``val/NAME``.
    """
    logged = {name: values[max(values)] for name, values in read_scalars(folder).items()}
    tests = sorted((folder / 'test').glob('*/*.json'))
    tested = json.loads(tests[-1].read_text()) if tests else {}
    metrics = {name: value for name, value in tested.items() if not name.endswith('time')}
    validated = {f'val/{name}': logged[name] for name in metrics if name in logged}
    parts = {name: value for name, value in logged.items() if 'loss' in name}
    return {'loss': logged['loss'], **parts, **validated, **metrics}


def table(results: dict[str, dict[int, dict[str, float]]]) -> str:
    """The means over seeds with 95 percent intervals, as a table in Markdown.

    Args:
        results (dict): values by start, seed and metric.
    """
    first = next(iter(results))
    metrics = list(next(iter(results[first].values())))
    lines = [
        f'Mean over {len(results[first])} seeds, with 95 percent intervals; in brackets the difference from {first},',
        'paired by seed.',
        '',
        f'| start | {" | ".join(metrics)} |',
        '|---' * (1 + len(metrics)) + '|',
    ]
    for name, by_seed in results.items():
        cells = []
        for metric in metrics:
            own = [by_seed[seed][metric] for seed in by_seed]
            differences = [by_seed[seed][metric] - results[first][seed][metric] for seed in by_seed]
            digits = 3 if 'loss' in metric else 2
            change = f' ({cell(over_seeds(differences), digits, "+")})' if name != first else ''
            cells.append(cell(over_seeds(own), digits) + change)
        lines.append(f'| {name} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def over_seeds(values: list[float]) -> Interval:
    """The mean of one value per seed, with its interval; that of one seed is not known."""
    return interval(np.array([values])) if len(values) > 1 else Interval(values[0], float('nan'))


def cell(value: Interval, digits: int, sign: str = '') -> str:
    mean, half = f'{value.mean:{sign}.{digits}f}', f'{value.half:.{digits}f}'
    return f'{mean} ± {half}' if value.half == value.half else mean


def plot(out: Path, starts: list[Start], seeds: list[int]) -> None:
    """Write a PNG of the losses over the iterations: the mean over seeds, and their range."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout='constrained')
    for start in starts:
        curves = [read_scalars(start.folder(out, seed))['loss'] for seed in seeds]
        steps = sorted(set.intersection(*map(set, curves)))
        losses = np.array([[curve[step] for step in steps] for curve in curves])
        axes.plot(steps, losses.mean(0), label=start.name)
        axes.fill_between(steps, losses.min(0), losses.max(0), alpha=0.2)
    axes.set(xlabel='iteration', ylabel='loss on training images', title='mean over seeds, and their range')
    axes.grid(alpha=0.3)
    axes.legend()
    with whole(out / 'losses.png') as partial:
        figure.savefig(partial, dpi=110, format='png')
    plt.close(figure)


def report(results: dict, starts: list[Start], out: Path) -> None:
    """Write the table and the plot, and print the table."""
    write_csv(results, out / 'results.csv')
    text = table(results)
    with whole(out / 'results.md') as partial:
        partial.write_text(text + '\n')
    plot(out, starts, list(results[starts[0].name]))
    print(f'\n{text}\n')
    for name in ('results.csv', 'results.md', 'losses.png'):
        print(f'wrote {out / name}')


def write_csv(results: dict, path: Path) -> None:
    with whole(path) as partial, partial.open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['start', 'seed', 'metric', 'value'])
        for name, by_seed in results.items():
            for seed, values in by_seed.items():
                writer.writerows([name, seed, metric, f'{value:.6g}'] for metric, value in values.items())


def main() -> int:
    args = parse_args()
    try:
        starts = read_starts(args.start)
        by_name = {start.name: start for start in starts}
        if args.run:
            return train_and_test(args, by_name[args.run[0]], int(args.run[1]))
        for start in starts:
            check_start(args, start)
        check_folder(args.out, '--out')
        for start in starts:
            given = dict(start._asdict(), config=args.config)
            check_folder(args.out / start.name, '--out')
            keep(given, args.out / start.name / 'start.json')
        files = {(start, seed): start.folder(args.out, seed) / RESULT for seed in args.seeds for start in starts}
        jobs = [
            Job(
                f'{start.name} with seed {seed}',
                [str(Path(__file__).resolve()), *sys.argv[1:], '--run', start.name, str(seed)],
                file.with_name('run.log'),
            )
            for (start, seed), file in files.items()
            if not file.exists()
        ]
        with Progress(len(files), len(files) - len(jobs)) as progress:
            run_jobs(jobs, args.jobs, lambda: progress.show(sum(file.exists() for file in files.values())))
        results = {
            start.name: {seed: json.loads(files[start, seed].read_text()) for seed in args.seeds} for start in starts
        }
        report(results, starts, args.out)
    except (OSError, ValueError) as error:
        return bad_input(error)
    return 0


if __name__ == '__main__':
    sys.exit(ending.run(main))
