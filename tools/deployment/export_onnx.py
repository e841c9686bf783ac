"""Export a trained model, or a part of it, to an ONNX file, and compare the file with PyTorch.

The file holds only operators of the ONNX standard. It is there only if onnxruntime, and OpenVINO where it is installed,
give the values that PyTorch gives.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from swinv2_tools import ending  # isort: split

import argparse
import importlib.util
import os
from contextlib import nullcontext

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from swinv2_tools import onnx_files
from swinv2_tools.onnx_models import Exported, Pyramid, Segmentor, any_size_pools
from torch import Tensor, nn

from swinv2_mm import SwinTransformerV2, compat
from swinv2_mm.checks.options import ConfigOptions
from swinv2_mm.engine import launch
from swinv2_mm.writing import check_file, unwritten, whole

BATCHES = (1, 2)  # that a file for any batch is compared at; exported at the last, because torch takes 1 for a constant
FILE_LIMIT = 2**31  # bytes, of any protobuf message
OPSETS = range(18, 24)  # that torch's exporter writes
STANDARD = ('RoIAlign',)  # of mmcv, and in ONNX

EPILOG = """\
in:
  image (B, 3, H, W), float32, normalised as in training. With --preprocess (B, H, W, 3), integers of 8 bits, as OpenCV
  loads images; normalisation, and padding to a multiple of pixels, are part of the file. Resizing is not.
out, of --part
  backbone  maps (B, C, h, w): stride4, stride8, ...
  neck      maps (B, C, h, w): level0, level1, ...
  model     of a segmentor labels (B, H, W), or with --output scores the probabilities (B, classes, H, W).
            Of a RetinaNet, Faster or Mask R-CNN boxes (B, N, 4), corners in pixels of the image, scores (B, N) and
            labels (B, N), in order of falling score; scores and labels are -1 where fewer than N are found. Of a Mask
            R-CNN also masks (B, N, 28, 28), probabilities inside the box. docs/export.md shows how to paste them.

compared before the file gets its name, with onnxruntime and, where it is installed, OpenVINO:
  at batch 1 and 2 with --dynamic batch, and at three sizes with --dynamic size. Maps and scores may differ by 1e-4 of
  their largest value, boxes by 1e-4 of the largest coordinate. Another label may score 1e-4 more than the one in the
  file. Boxes are compared with the score threshold at 0, as noise has no objects; two in a hundred may have no
  counterpart, since rounding decides between boxes that are equally good.

what can't be exported:
  Other whole detectors: export --part neck and run the heads in PyTorch.
  Parts with operators of mmcv, such as deformable convolution, or the deformable attention of Mask2Former and DINO.
  Half precision, and weights of 2 GiB or more (huge, giant), which one ONNX file can't hold.

example: python tools/deployment/export_onnx.py configs/mask_rcnn_swinv2.py work_dirs/mask_rcnn_swinv2/epoch_12.pth \\
             --out backbone.onnx --size 800 1344 --dynamic batch
"""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.partition('\n')[0], epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file of a detector (mmdet) or segmentor (mmseg)')
    parser.add_argument('checkpoint', help='checkpoint file that training wrote; none: random weights, for a trial')
    parser.add_argument('--out', required=True, metavar='FILE.onnx', help='file to write, in place of an old one')
    parser.add_argument('--size', required=True, nargs=2, type=int, metavar=('H', 'W'), help='of the image, in pixels')
    parser.add_argument(
        '--part',
        choices=('backbone', 'neck', 'model'),
        default='backbone',
        help='the backbone alone (default), the backbone with its neck, or the whole model',
    )
    parser.add_argument(
        '--dynamic',
        nargs='+',
        choices=('batch', 'size'),
        default=(),
        help='batch: a file for any batch; size: for images of any size from one window up, which is slower at each. '
        'Default: for --batch images of --size',
    )
    parser.add_argument('--batch', type=int, metavar='N', help='images in a batch, all of them (default: 1)')
    parser.add_argument('--preprocess', action='store_true', help='make normalisation and padding a part of the file')
    parser.add_argument(
        '--output',
        choices=('labels', 'scores'),
        help='of a whole segmentor: labels (default), or scores of all classes',
    )
    parser.add_argument('--opset', type=int, choices=OPSETS, default=20, help='version of the operators (default: 20)')
    parser.add_argument(
        '--window-size', nargs='+', type=int, metavar='N', help="instead of the config's: for all stages or for each"
    )
    parser.add_argument(
        '--repeat', type=int, default=0, metavar='N', help='then time PyTorch and the runtimes, N times each in turns'
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=ConfigOptions, metavar='KEY=VALUE', help='override values of the config'
    )
    return parser.parse_args(argv)


def check_request(args: argparse.Namespace) -> None:
    """Refuse at once what the flags alone show to be impossible.

    Raises:
        ValueError: the message says what to ask for instead.
    """
    compat.require((2, 7), 'the export')  # earlier versions do not tell exporting from compiling
    if 'batch' in args.dynamic and args.batch is not None:
        raise ValueError(
            '--dynamic batch makes a file for any batch, --batch a file for that batch only: leave one out'
        )
    if args.batch is not None and args.batch < 1:
        raise ValueError(f'--batch must be 1 image or more, got {args.batch}')
    if args.repeat < 0:
        raise ValueError(f'--repeat must be 0 runs or more, got {args.repeat}')
    if min(args.size) < 1:
        raise ValueError(f'--size must be a height and a width of 1 pixel or more, got {args.size}')
    if not args.out.endswith('.onnx'):
        raise ValueError(f'--out {args.out}: name a file that ends with .onnx')
    if not all(importlib.util.find_spec(name) for name in onnx_files.LIBRARIES):
        raise ValueError(f'export needs {", ".join(onnx_files.LIBRARIES)}: python tools/install.py installs them')


def read_config(args: argparse.Namespace) -> Config:
    """Read the config of a model that has the part to export.

    Raises:
        ValueError: the model does not have it, or the config can't be read.
    """
    cfg = launch.load_config(args.config, args.cfg_options)
    launch.set_initial_weights(cfg, 'none')
    backbones = launch.check_backbone(cfg)
    if args.window_size:
        launch.set_window_size(backbones, args.window_size)
    if args.part == 'neck' and not cfg.model.get('neck'):
        raise ValueError(f'model {cfg.model.type} of {args.config} has no neck: use --part backbone')
    if args.output and not (args.part == 'model' and cfg.default_scope == 'mmseg'):
        raise ValueError(f'--output {args.output} is for a whole segmentor: add --part model, or leave it out')
    backbone = cfg.model.get('backbone') or {}
    if not launch.is_ours(backbone, cfg):
        raise ValueError(f'backbone {backbone.get("type")} of {args.config} is not SwinTransformerV2')
    with torch.device('meta'), DefaultScope.overwrite_default_scope(cfg.default_scope):
        size = sum(p.nbytes for p in MODELS.build(cfg.model.backbone).parameters())
    if size >= FILE_LIMIT:
        raise ValueError(f'weights of {size / 2**30:.1f} GiB are not exported: an ONNX file holds 2 GiB at most')
    return cfg


def build(cfg: Config, args: argparse.Namespace) -> Exported:
    """Build the part to export, with its weights, in eval mode.

    Raises:
        ValueError: the checkpoint or the window does not fit, or a part has operators that ONNX does not.
    """
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    channels = model.backbone.patch_embed.proj.in_channels
    if args.preprocess and channels != 3:
        raise ValueError(f'--preprocess is for images of 3 channels, and the backbone takes {channels}: leave it out')
    if args.part != 'model':
        exported = Pyramid(model, args.preprocess, has_neck=args.part == 'neck')
    elif cfg.default_scope == 'mmseg':
        exported = Segmentor(model, args.preprocess, args.output or 'labels')
    else:
        from swinv2_tools.onnx_detectors import Detector  # needs mmdet

        exported = Detector(model, args.preprocess)
    check_operators(model, args.part)
    if args.checkpoint.lower() != 'none':
        launch.load_weights(model, args.checkpoint)
    else:
        open_branches(model.backbone)
        exported.spread_scores()
    if args.window_size:
        launch.set_window_size(model.backbone, args.window_size)
    return exported.eval().requires_grad_(False)


def check_operators(model: nn.Module, part: str) -> None:
    """Refuse operators of mmcv that ONNX does not have."""
    root = model if part == 'model' else getattr(model, part)
    kinds = {type(module) for module in root.modules()}
    custom = {kind.__name__ for kind in kinds if kind.__module__.startswith('mmcv.ops')} - {*STANDARD}
    if custom:
        names = ', '.join(sorted(custom))
        raise ValueError(
            f'{part} {type(root).__name__} has {names} of mmcv, which ONNX does not have: '
            f'use --part {"backbone" if part == "neck" or not hasattr(model, "neck") else "neck or backbone"}'
        )


def open_branches(backbone: SwinTransformerV2) -> None:
    """Start the post-norms of the blocks at 1: at the official 0 a block is the identity, whatever its attention."""
    for stage in backbone.layers:
        for block in stage.blocks:
            nn.init.ones_(block.norm1.weight)
            nn.init.ones_(block.norm2.weight)


def example(exported: Exported, batch: int, height: int, width: int) -> Tensor:
    """An image of noise, as the file takes it."""
    if exported.preprocess is not None:
        return torch.randint(256, (batch, height, width, 3), dtype=torch.uint8)
    return torch.randn(batch, exported.model.backbone.patch_embed.proj.in_channels, height, width)


def trial_sizes(backbone: SwinTransformerV2, args: argparse.Namespace) -> list[tuple[int, int]]:
    """The sizes that a file is compared at: its own, or with --dynamic size also the smallest and one between.

    Raises:
        ValueError: ``--size`` is smaller than a window.
    """
    if 'size' not in args.dynamic:
        return [tuple(args.size)]
    smallest = max(backbone.window_size) * backbone.patch_embed.patch_size
    if min(args.size) < smallest:
        raise ValueError(f'--dynamic size starts at one window, {smallest} pixels: --size {args.size} is smaller')
    between = tuple((smallest + side) // 2 + 1 + i for i, side in enumerate(args.size))
    return [(smallest, smallest), between, tuple(args.size)]


def open_axes(exported: Exported, args: argparse.Namespace, smallest: int) -> dict:
    """The axes of the image that are open, with their `torch.export.Dim`."""
    first = 1 if exported.preprocess is not None else 2
    axes = {}
    if 'batch' in args.dynamic:
        axes[0] = torch.export.Dim('batch')
    if 'size' in args.dynamic:
        for axis, name in enumerate(('height', 'width'), first):
            axes[axis] = torch.export.Dim(name, min=smallest)
    return axes


@torch.no_grad()
def write(exported: Exported, args: argparse.Namespace) -> None:
    """Export, compare, and only then give the file its name.

    Raises:
        ValueError: torch can't export it, or the file can't be written.
        VerificationError: the file does not do what PyTorch does.
    """
    import onnx

    out = Path(args.out)
    check_file(out, '--out')  # before the minutes of work
    torch.manual_seed(0)
    sizes = trial_sizes(exported.model.backbone, args)
    batches = BATCHES if 'batch' in args.dynamic else (args.batch or 1,)
    images = [example(exported, batch, *size) for size in sizes for batch in batches]
    expected = [exported.expected(image) for image in images]
    names = exported.names(len(expected[0]))
    try:
        with whole(out) as partial:
            axes = open_axes(exported, args, min(sizes[0]))
            with any_size_pools(exported.model) if 'size' in args.dynamic else nullcontext():
                model = onnx_files.export(exported, images[-1], names, axes, args.opset)
            onnx_files.check_standard(model)
            onnx.save(exported.on_trial(model), partial)
            onnx_files.compare(partial, exported, images, expected)
            onnx.save(model, partial)
            seconds = onnx_files.measure(partial, exported, images[-len(batches)], args.repeat) if args.repeat else {}
    except OSError as error:
        raise ValueError(unwritten(error)) from error
    print(f'wrote {out}: {os.path.getsize(out) / 1e6:.1f} MB, {len(model.graph.node)} operators of opset {args.opset}')
    for value in (*model.graph.input, *model.graph.output):
        sides = [side.dim_param or str(side.dim_value) for side in value.type.tensor_type.shape.dim]
        print(f'  {value.name} ({", ".join(sides)})')
    print(f'operators: {onnx_files.operators(model)}')
    for name, median in seconds.items():
        print(f'{name}: {median:.3f} s, {median / seconds["PyTorch"]:.2f} of PyTorch')


def main():
    args = parse_args()
    try:
        check_request(args)
        exported = build(read_config(args), args)
        height, width = args.size
        print(f'exporting {exported} for images of {height} x {width}, which takes a minute or more', flush=True)
        write(exported, args)
    except ValueError as error:
        sys.exit(launch.bad_input(error))
    except onnx_files.VerificationError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(1)


if __name__ == '__main__':
    ending.run(main)
