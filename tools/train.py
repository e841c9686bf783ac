"""Train a detector or segmentor from its config."""

from swinv2_tools import ending  # isort: split

import argparse
import logging
from pathlib import Path

from mmengine.runner import FlexibleRunner
from swinv2_tools.startup import check_config, check_data_contents, errors_in_one_line, read_config

from swinv2_mm import CheckpointError
from swinv2_mm.engine import launch, run_folder
from swinv2_mm.engine.runner import runner_class
from swinv2_mm.engine.strategy_checks import check_strategy
from swinv2_mm.main_process import in_main_process


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='example: python tools/train.py configs/mask_rcnn_swinv2.py --data-root data/coco --amp bf16',
    )
    parser.add_argument('config', help='config file of a detector (mmdet) or segmentor (mmseg)')
    parser.add_argument('--work-dir', help='where logs and checkpoints go (default: work_dirs/NAME_OF_CONFIG)')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='PATH',
        help='continue from a checkpoint; without PATH, from the whole one in the work dir with the most iterations',
    )
    parser.add_argument('--amp', choices=('bf16', 'fp16'), help='train in mixed precision')
    parser.add_argument('--checkpoint', help='initial weights of the backbone: a path, a URL, or none (from scratch)')
    parser.add_argument('--prefix', default='', metavar='NAME', help=launch.PREFIX_HELP)
    parser.add_argument('--seed', type=int, help='seed of all randomness')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by the run's batch size, over auto_scale_lr.base_batch_size of the config",
    )
    parser.add_argument('--no-validate', action='store_true', help='train only; no validation data is needed')
    launch.add_arguments(parser)
    return parser.parse_args(argv)


def prepare(args):
    """Make the config that the flags ask for, and check it.

    Raises:
        ValueError: a flag, the config, the data or a checkpoint is wrong; the message says what to do.
    """
    cfg = read_config(args)

    def check_backbone():
        launch.check_backbone(cfg)

    if args.prefix and (args.checkpoint or 'none').lower() == 'none':
        raise ValueError(f'--prefix {args.prefix} chooses a backbone in the file of --checkpoint: pass that too')
    if args.checkpoint:
        launch.set_initial_weights(cfg, args.checkpoint, args.prefix)
    if args.amp:
        launch.set_amp(cfg, args.amp)
    if args.seed is not None:
        cfg.randomness = dict(cfg.get('randomness') or {}, seed=args.seed)
    scaling = cfg.get('auto_scale_lr') or {}
    if args.auto_scale_lr and isinstance(scaling, dict):  # else `check_config` says that it must be one
        cfg.auto_scale_lr = dict(scaling, enable=True)
    if args.no_validate:
        launch.drop_validation(cfg)
    splits = ('train', 'val') if cfg.get('val_cfg') else ('train',)
    check_config(cfg, args, splits)
    launch.init_distributed(cfg, args.launcher)
    if issubclass(runner_class(cfg), FlexibleRunner):
        check_strategy(cfg)
    if args.resume:
        cfg.load_from = in_main_process(lambda: run_folder.find_resume(cfg.work_dir, args.resume))
        cfg.resume = True
        launch.drop_initial_weights(cfg)  # the checkpoint brings all weights
    in_main_process(check_backbone)
    check_data_contents(cfg, args, splits)
    return cfg


def main():
    args = parse_args()
    logging.raiseExceptions = False  # where a log can't be written, the error that ends the run says why
    with errors_in_one_line():
        cfg = prepare(args)
        run_folder.lock_work_dir(cfg.work_dir)
        runner = runner_class(cfg).from_cfg(cfg)
        if hasattr(runner, 'prepare'):  # else it is mmengine's own FlexibleRunner
            runner.prepare()
    try:
        with errors_in_one_line(CheckpointError):
            runner.train()
    except KeyboardInterrupt as end:
        if any(Path(cfg.work_dir).glob('*.pth')):
            end.args = ('continue with --resume',)
        raise


if __name__ == '__main__':
    ending.run(main)
