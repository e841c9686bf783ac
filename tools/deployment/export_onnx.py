"""Export a trained backbone, alone or with its neck, to an ONNX file, and compare the file with PyTorch.

The file takes images of one size, and holds only operators of the ONNX standard. It is there only if onnxruntime gives
the values that PyTorch gives.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from swinv2_tools import ending  # isort: split

import argparse
import importlib.util
import logging
import math
import os
import warnings
from collections.abc import Sequence

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from swinv2_mm import SwinTransformerV2, compat
from swinv2_mm.checks.options import ConfigOptions
from swinv2_mm.engine import launch
from swinv2_mm.messages import first_line
from swinv2_mm.writing import check_file, unwritten, whole

TOLERANCE = 1e-4  # of the largest value of a map
BATCHES = (1, 2)  # that a file for any batch is compared at; exported at the last, because torch takes 1 for a constant
FILE_LIMIT = 2**31  # bytes, of any protobuf message
LIBRARIES = ('onnx', 'onnxruntime', 'onnxscript')
OPSETS = range(18, 24)  # that torch's exporter writes

EPILOG = """\
in and out:
  image (B, 3, H, W), float32, normalised as in training: mean and std are not part of the file.
  Maps (B, C, h, w): stride4, stride8, ... of the backbone, level0, level1, ... of the neck.
  Before the file gets its name onnxruntime runs it, at batch 1 and 2 with --dynamic batch and else at its own batch;
  no value of a map may differ from PyTorch's by more than 1e-4 of the map's largest value.

what can't be exported:
  The whole model: proposals, NMS and the sampling of masks depend on what is in an image, and need operators of mmcv.
  Another image size than --size: windows are cut for one. Export a file for each.
  A neck with operators of mmcv, such as deformable convolution.
  Half precision, and weights of 2 GiB or more (huge, giant), which one ONNX file can't hold.

example: python tools/deployment/export_onnx.py configs/mask_rcnn_swinv2.py work_dirs/mask_rcnn_swinv2/epoch_12.pth \\
             --out backbone.onnx --size 800 1344 --dynamic batch
"""


class VerificationError(Exception):
    """The exported file does not do what the model does. The message is one line."""


class Pyramid(nn.Module):
    """What is exported: the backbone, or the backbone and its neck."""

    def __init__(self, backbone: SwinTransformerV2, neck: nn.Module | None):
        super().__init__()
        self.backbone = backbone
        self.neck = neck

    def __str__(self):
        return 'the backbone' if self.neck is None else f'the backbone with its neck, {type(self.neck).__name__}'

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        maps = self.backbone(image)
        return maps if self.neck is None else tuple(self.neck(maps))


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
        help='the backbone alone (default), or the backbone with its neck; the whole model is refused, see below',
    )
    parser.add_argument(
        '--dynamic',
        choices=('batch', 'size'),
        help='batch: a file for any batch (default: for --batch images); size is refused, see below',
    )
    parser.add_argument('--batch', type=int, metavar='N', help='images in a batch, all of them (default: 1)')
    parser.add_argument('--opset', type=int, choices=OPSETS, default=20, help='version of the operators (default: 20)')
    parser.add_argument(
        '--window-size', nargs='+', type=int, metavar='N', help="instead of the config's: for all stages or for each"
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
    if args.part == 'model':
        raise ValueError(
            '--part model: a whole model is not exported: proposals, NMS and the sampling of masks depend on what '
            'is in an image and need operators of mmcv; export --part neck or backbone, and run its heads in PyTorch'
        )
    if args.dynamic == 'size':
        raise ValueError(
            '--dynamic size: windows are cut for one image size; export a file for each --size, --dynamic batch is fine'
        )
    if args.dynamic == 'batch' and args.batch is not None:
        raise ValueError(
            '--dynamic batch makes a file for any batch, --batch a file for that batch only: leave one out'
        )
    if args.batch is not None and args.batch < 1:
        raise ValueError(f'--batch must be 1 image or more, got {args.batch}')
    if min(args.size) < 1:
        raise ValueError(f'--size must be a height and a width of 1 pixel or more, got {args.size}')
    if not args.out.endswith('.onnx'):
        raise ValueError(f'--out {args.out}: name a file that ends with .onnx')
    if not all(importlib.util.find_spec(name) for name in LIBRARIES):
        raise ValueError(f'export needs {", ".join(LIBRARIES)}: python tools/install.py installs them')


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
    kind = (cfg.model.get('backbone') or {}).get('type')
    if kind != 'SwinTransformerV2':
        raise ValueError(f'backbone {kind} of {args.config} is not SwinTransformerV2')
    with torch.device('meta'):
        size = sum(p.nbytes for p in MODELS.build(cfg.model.backbone).parameters())
    if size >= FILE_LIMIT:
        raise ValueError(f'weights of {size / 2**30:.1f} GiB are not exported: an ONNX file holds 2 GiB at most')
    return cfg


def build(cfg: Config, args: argparse.Namespace) -> Pyramid:
    """Build the part to export, with its weights, in eval mode.

    Raises:
        ValueError: the checkpoint or the window does not fit, or the neck has operators that ONNX does not.
    """
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    pyramid = Pyramid(model.backbone, model.neck if args.part == 'neck' else None)
    custom = {type(module).__name__ for module in pyramid.modules() if type(module).__module__.startswith('mmcv.ops')}
    if custom:
        raise ValueError(
            f'neck {type(model.neck).__name__} has {", ".join(sorted(custom))} of mmcv, which ONNX does not have: '
            'use --part backbone'
        )
    if args.checkpoint.lower() != 'none':
        launch.load_weights(model, args.checkpoint)
    else:
        open_branches(model.backbone)
    if args.window_size:
        launch.set_window_size(model.backbone, args.window_size)
    return pyramid.eval().requires_grad_(False)


def open_branches(backbone: SwinTransformerV2) -> None:
    """Start the post-norms of the blocks at 1: at the official 0 a block is the identity, whatever its attention."""
    for stage in backbone.layers:
        for block in stage.blocks:
            nn.init.ones_(block.norm1.weight)
            nn.init.ones_(block.norm2.weight)


def output_names(pyramid: Pyramid, num_maps: int) -> list[str]:
    """Names of the maps, by stride for those of a backbone."""
    if pyramid.neck is not None:
        return [f'level{i}' for i in range(num_maps)]
    return [f'stride{pyramid.backbone.patch_embed.patch_size * 2**i}' for i in pyramid.backbone.out_indices]


def export(pyramid: Pyramid, image: Tensor, names: list[str], dynamic_batch: bool, opset: int):
    """The ONNX model of a pyramid for images as large as ``image`` (B, 3, H, W), and for batches of B or of any size.

    The exporter is the one on `torch.export`, in which the number of windows is an expression of the batch. The tracing
    exporter would write it into the file as a constant, and the file would be wrong for any other batch.

    Raises:
        ValueError: torch can't export it.
    """
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)  # it warns that torchvision is not installed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about code of torch itself
            program = torch.onnx.export(
                pyramid,
                (image,),
                input_names=['image'],
                output_names=names,
                opset_version=opset,
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim('batch')},) if dynamic_batch else None,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = first_line(error.__cause__ or error)
        raise ValueError(f'torch {torch.__version__} does not export {pyramid}: {reason}') from error
    model = program.model_proto
    for node in (model.graph, *model.graph.node, *model.graph.value_info):
        node.ClearField('metadata_props')  # stack traces
    return model


def check_standard(model) -> None:
    """Check that an ONNX model is valid, and that any runtime has its operators.

    Raises:
        VerificationError: it is not, or needs custom operators.
    """
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError(f'what was exported is not valid: {first_line(error)}') from error
    custom = {opset.domain for opset in model.opset_import} - {'', 'ai.onnx'}
    if custom:
        raise VerificationError(
            f'what was exported needs operators beyond the standard, of {", ".join(sorted(custom))}'
        )


def compare(path: Path, images: Sequence[Tensor], expected: Sequence[Sequence[Tensor]]) -> None:
    """Run a file with onnxruntime on CPU, and compare its maps with those of PyTorch.

    Args:
        path (Path): the file.
        images (Sequence[Tensor]): (B, 3, H, W) each.
        expected (Sequence[Sequence[Tensor]]): the maps of each.

    Raises:
        VerificationError: one differs by more than `TOLERANCE` of its largest value, or the file does not run.
    """
    import onnxruntime

    for image, maps in zip(images, expected):
        try:
            session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
            outs = session.run(None, {'image': image.numpy()})
        except Exception as error:  # onnxruntime has a class of its own for each reason
            raise VerificationError(f'onnxruntime does not run what was exported: {first_line(error)}') from error
        worst = max(difference(torch.from_numpy(out), value) for out, value in zip(outs, maps))
        says = f'at batch {len(image)} onnxruntime and PyTorch differ by {worst:.1e} of the largest value of a map'
        if not worst <= TOLERANCE:
            raise VerificationError(f'{says}, more than {TOLERANCE:.0e}: nothing is written')
        print(says)


def difference(out: Tensor, value: Tensor) -> float:
    """The largest difference from what a map should be, over its largest value; infinite if the shapes differ."""
    if out.shape != value.shape:
        return math.inf
    return ((out - value).abs().max() / value.abs().max()).nan_to_num(math.inf).item()


@torch.no_grad()
def write(pyramid: Pyramid, args: argparse.Namespace) -> None:
    """Export, compare, and only then give the file its name.

    Raises:
        ValueError: torch can't export it, or the file can't be written.
        VerificationError: the file does not do what PyTorch does.
    """
    import onnx

    torch.manual_seed(0)
    batches = BATCHES if args.dynamic == 'batch' else (args.batch or 1,)
    channels = pyramid.backbone.patch_embed.proj.in_channels
    images = [torch.randn(batch, channels, *args.size) for batch in batches]
    expected = [pyramid(image) for image in images]
    names = output_names(pyramid, len(expected[0]))
    out = Path(args.out)
    check_file(out, '--out')  # before the minutes of work
    try:
        with whole(out) as partial:
            model = export(pyramid, images[-1], names, args.dynamic == 'batch', args.opset)
            check_standard(model)
            onnx.save(model, partial)
            compare(partial, images, expected)
    except OSError as error:
        raise ValueError(unwritten(error)) from error
    print(f'wrote {out}: {os.path.getsize(out) / 1e6:.1f} MB, {len(model.graph.node)} operators of opset {args.opset}')
    for value in (*model.graph.input, *model.graph.output):
        sides = [side.dim_param or str(side.dim_value) for side in value.type.tensor_type.shape.dim]
        print(f'  {value.name} ({", ".join(sides)})')


def main():
    args = parse_args()
    try:
        check_request(args)
        pyramid = build(read_config(args), args)
        height, width = args.size
        print(f'exporting {pyramid} for images of {height} x {width}, which takes a minute or more', flush=True)
        write(pyramid, args)
    except ValueError as error:
        sys.exit(launch.bad_input(error))
    except VerificationError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(1)


if __name__ == '__main__':
    ending.run(main)
