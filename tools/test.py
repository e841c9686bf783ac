"""Evaluate a trained detector or segmentor: COCO metrics or mIoU."""

from swinv2_tools import ending  # isort: split

import argparse
import errno
import logging
import pickle
import sys
import warnings
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.runner import Runner
from swinv2_tools.image_files import output_stems, picture_extension, relative_names
from swinv2_tools.overlays import HOSTS, draw_to_scale
from swinv2_tools.startup import check_config, check_data_contents, errors_in_one_line, read_config

from swinv2_mm.checkpoints.files import read_checkpoint
from swinv2_mm.engine import launch
from swinv2_mm.engine.runner import runner_class
from swinv2_mm.engine.tta import TTA_HELP, TTA_WARNING, NoBoxesError, augment_test
from swinv2_mm.writing import check_file, check_folder, unwritten, whole


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='example: python tools/test.py configs/mask_rcnn_swinv2.py work_dirs/mask_rcnn_swinv2/epoch_12.pth '
        '--show-dir pictures',
    )
    parser.add_argument('config', help='config file of a detector (mmdet) or segmentor (mmseg)')
    parser.add_argument('checkpoint', help='checkpoint file that training wrote')
    parser.add_argument('--work-dir', help='where the log goes (default: work_dirs/NAME_OF_CONFIG)')
    parser.add_argument(
        '--window-size',
        type=int,
        nargs='+',
        metavar='N',
        help='attend in other windows than in training, one size for all stages or one per stage, in tokens',
    )
    parser.add_argument('--tta', action='store_true', help=TTA_HELP)
    parser.add_argument('--out', metavar='FILE.pkl', help='write the predictions to a pickle file')
    parser.add_argument(
        '--show-dir',
        metavar='DIR',
        help='write pictures of the ground truth, on the left, beside the predictions, named as the images and in the '
        'same sub-folders; images smaller than 160 x 160 pixels get no labels, which would cover them; with several '
        'processes, only the images that the first one tests',
    )
    launch.add_arguments(parser)
    return parser.parse_args(argv)


def prepare(args):
    """Make the config that the flags ask for, and check it.

    Raises:
        ValueError: a flag, the config, the data or the checkpoint is wrong; the message says what to do.
    """
    cfg = read_config(args, Runner)
    cfg.load_from, cfg.resume = None, False  # the checkpoint named is the one tested
    launch.drop_initial_weights(cfg)
    check_config(cfg, args, ('test',))
    backbones = launch.check_backbone(cfg)
    if args.window_size:
        launch.set_window_size(backbones, args.window_size)
    read_checkpoint(args.checkpoint)  # a file that can't be read shows before data and model are built
    check_data_contents(cfg, args, ('test',))
    if args.out:
        dump_predictions(cfg, args.out)
    if args.show_dir:
        draw_every_image(cfg)
    launch.init_distributed(cfg, args.launcher)
    if args.tta:
        augment_test(cfg, args.cfg_options or ())
        warnings.filterwarnings('ignore', TTA_WARNING)
    if args.out:
        check_file(Path(args.out), '--out')
    if args.show_dir:
        check_folder(Path(args.show_dir), '--show-dir')
    check_folder(Path(cfg.work_dir), '--work-dir')
    return cfg


def draw_every_image(cfg):
    """Turn on the hook that draws, or add that of the host, and its visualizer where the config has none."""
    visualizer, hook = HOSTS[cfg.default_scope]
    hooks = cfg.get('default_hooks') or {}
    own = hooks.get('visualization') or dict(type=hook)
    cfg.default_hooks = dict(hooks, visualization=dict(own, draw=True, interval=1))
    if not cfg.get('visualizer'):
        cfg.visualizer = dict(type=visualizer, vis_backends=[dict(type='LocalVisBackend')])


def dump_predictions(cfg, path):
    """Collect predictions in addition to metrics."""
    if not path.endswith(('.pkl', '.pickle')):
        raise ValueError(f'--out {path}: predictions are written as pickle, name a file that ends with .pkl')
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    kind = 'DumpDetResults' if cfg.default_scope == 'mmdet' else 'DumpResults'
    cfg.test_evaluator = [*evaluators, dict(type=kind, out_file_path=path)]


def keep_predictions(runner):
    """Collect the predictions here: the metric that writes them would do so before any metric is logged.

    Returns:
        list: receives the predictions, in the main process.
    """
    predictions = []
    runner.test_loop.evaluator.metrics[-1].compute_metrics = lambda results: predictions.extend(results) or {}
    return predictions


def write_pictures(runner, folder):
    """Make the host's visualization hook write its pictures to a folder, until one can't be written.

    Pictures are named as the images, and lie in the same folders below that of all images. Where the data set does not
    list its images, they all lie in one folder.

    Returns:
        list: receives the problem, as text.
    """
    problems, draw = [], draw_to_scale(runner.visualizer).add_datasample
    dataset = runner.test_loop.dataloader.dataset
    listed = range(len(dataset)) if hasattr(dataset, 'get_data_info') else ()
    names = relative_names(dataset.get_data_info(i)['img_path'] for i in listed)
    stems = output_stems(names.values())

    def add_datasample(name, image, data_sample, **kwargs):
        path = data_sample.img_path
        if problems:
            return
        stem = stems[names[path]] if names else Path(path).stem
        extension = '.png' if runner.cfg.default_scope == 'mmseg' else picture_extension(path)
        try:
            with whole(Path(folder, stem + extension)) as partial:
                draw(name, image, data_sample, **{**kwargs, 'out_file': str(partial)})
        except OSError as error:
            problems.append(unwritten(error))

    runner.visualizer.add_datasample = add_datasample
    return problems


def full_disk(error, work_dir):
    """Say that the work dir, where mmengine writes, is full. Any other error is raised again."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise error
    return f'{work_dir} cannot be written: {error.strerror}'


def main():
    args = parse_args()
    logging.raiseExceptions = False  # of a log that can't be written
    try:
        with errors_in_one_line():
            cfg = prepare(args)
            runner = runner_class(cfg, Runner).from_cfg(cfg)
            model = launch.load_weights(runner.model, args.checkpoint)
            if args.window_size:
                launch.set_window_size(model, args.window_size)
    except OSError as error:
        sys.exit(launch.bad_input(full_disk(error, args.work_dir or 'the work dir')))
    predictions = keep_predictions(runner) if args.out else []
    problems = write_pictures(runner, args.show_dir) if args.show_dir and is_main_process() else []
    try:
        with errors_in_one_line(NoBoxesError):
            runner.test()
    except OSError as error:  # of mmengine, which writes metrics to the work dir after it has shown them
        problems.append(full_disk(error, cfg.work_dir))
    if args.out and is_main_process():
        try:
            with whole(Path(args.out)) as partial, partial.open('wb') as file:
                pickle.dump(predictions, file)
        except OSError as error:
            problems.append(unwritten(error))
    if problems:
        sys.exit(launch.bad_input('; '.join(problems)))


if __name__ == '__main__':
    ending.run(main)
