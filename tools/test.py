"""Evaluate a trained detector or segmentor: COCO metrics or mIoU."""

import argparse
import sys
from pathlib import Path

from mmengine.runner import Runner

import swinv2_mm.launch as launch


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
    parser.add_argument('--out', metavar='FILE.pkl', help='write the predictions to a pickle file')
    parser.add_argument('--show-dir', metavar='DIR', help='write pictures of predictions beside the ground truth')
    launch.add_arguments(parser)
    return parser.parse_args(argv)


def prepare(args):
    """The config that the flags ask for, checked.

    Raises:
        ValueError: a flag, the config, the data or the checkpoint is wrong; the message says what to do.
    """
    cfg = launch.load_config(args.config, args.cfg_options)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    if args.data_root:
        launch.set_data_root(cfg, args.data_root)
    cfg.load_from, cfg.resume = None, False  # the checkpoint named is the one tested
    if 'backbone' in cfg.model:
        launch.set_initial_weights(cfg, 'none')
    launch.check_data(cfg, ('test',))
    backbone = launch.check_backbone(cfg)
    if args.window_size:
        launch.set_window_size(backbone, args.window_size)
    launch.read_checkpoint(args.checkpoint)
    if args.out:
        dump_predictions(cfg, args.out)
    if args.show_dir:
        draw_predictions(cfg, args.show_dir)
    launch.init_distributed(cfg, args.launcher)
    return cfg


def dump_predictions(cfg, path):
    """Write predictions to ``path`` besides computing metrics."""
    if not path.endswith(('.pkl', '.pickle')):
        raise ValueError(f'--out {path}: predictions are written as pickle, name a file that ends with .pkl')
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    kind = 'DumpDetResults' if cfg.default_scope == 'mmdet' else 'DumpResults'
    cfg.test_evaluator = [*evaluators, dict(type=kind, out_file_path=path)]


def draw_predictions(cfg, folder):
    """Have the host's visualization hook write a picture of each image."""
    hook = cfg.default_hooks.visualization
    hook.update(draw=True, interval=1)
    folder = str(Path(folder).resolve())
    if cfg.default_scope == 'mmdet':
        hook.test_out_dir = folder
    else:
        cfg.visualizer.update(save_dir=folder)


def main():
    args = parse_args()
    try:
        cfg = prepare(args)
        runner = Runner.from_cfg(cfg)
        model = launch.load_weights(runner.model, args.checkpoint)
        if args.window_size:
            launch.set_window_size(model.backbone, args.window_size)
    except ValueError as error:
        sys.exit(launch.bad_input(error))
    runner.test()


if __name__ == '__main__':
    main()
