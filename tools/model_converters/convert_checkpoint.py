"""Convert a Swin V2 checkpoint of any published format to ours, or to the format of another library."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tools/, which has swinv2_tools/
from swinv2_tools import ending  # isort: split

import argparse
import json
import os
from collections import Counter

import torch

from swinv2_mm import CheckpointError, SwinTransformerV2
from swinv2_mm.arch import parse_arch, per_stage
from swinv2_mm.checkpoints.files import check_suffix, write_checkpoint
from swinv2_mm.checkpoints.fitting import check_complete
from swinv2_mm.checkpoints.formats import EXPORTS, export, export_config
from swinv2_mm.checkpoints.loading import named_in_errors, read_weights
from swinv2_mm.engine.launch import PREFIX_HELP, bad_input
from swinv2_mm.position_bias import POSITION_BIASES
from swinv2_mm.writing import whole


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='example: python tools/model_converters/convert_checkpoint.py work_dirs/mask_rcnn_swinv2/epoch_12.pth '
        'exported/model.safetensors --to timm; timm and transformers then load the folder "exported" by its '
        'config.json',
    )
    parser.add_argument('input', metavar='IN', help='path or URL of any Swin V2 checkpoint, or of a whole detector')
    parser.add_argument('output', metavar='OUT', help='file to write: .safetensors, .pth or .bin')
    parser.add_argument(
        '--to',
        choices=list(EXPORTS),
        help='the library to convert to (default: this one)',
    )
    parser.add_argument(
        '--pretrained-window-sizes',
        type=int,
        nargs='+',
        metavar='N',
        help='the pretrained windows, one or one per stage, for a checkpoint that does not say them',
    )
    parser.add_argument('--prefix', default='', metavar='NAME', help=PREFIX_HELP)
    return parser.parse_args(argv)


def choose_windows(inferred, given, num_stages, position_bias):
    """The pretrained windows per stage: those given, else those inferred.

    Raises:
        ValueError: there are neither, or those given are invalid.
    """
    if given is not None and not POSITION_BIASES[position_bias].has_pretrained_window:
        raise CheckpointError('the shape of its position bias shows the window: leave --pretrained-window-sizes out')
    if given is None:
        if inferred.pretrained_window_sizes is None:
            raise CheckpointError(
                'nothing says the windows it was trained with: pass --pretrained-window-sizes, for example '
                '16 16 16 8 for window 16 at 256 pixels'
            )
        return inferred.pretrained_window_sizes
    return per_stage('--pretrained-window-sizes', given, num_stages)


def write(weights, windows, to, out):
    """Write weights in our format, or in that of another library with the ``config.json`` that it needs beside them.

    Returns:
        int: the number of tensors written.

    Raises:
        CheckpointError: the other library cannot compute the backbone, or has no room for its windows; a
            ``config.json`` of other weights exists; or a file can't be written.
    """
    if to is None:
        write_checkpoint({**weights, 'pretrained_windows': torch.tensor(windows)}, out)
        return len(weights) + 1
    written, config, wrapper = export(weights, windows, to), export_config(weights, windows, to), EXPORTS[to].wrapper
    in_file = {wrapper: written} if wrapper and out.suffix != '.safetensors' else written
    if config is None:
        write_checkpoint(in_file, out)
        return len(written)
    path = out.parent / 'config.json'
    text = (json.dumps(config, indent=2) + '\n').encode()
    if path.exists() and path.read_bytes() != text:
        raise CheckpointError(f'{path} exists and describes other weights: choose another folder for OUT')
    with whole(path) as partial:  # it gets its name once the weights are written
        partial.write_bytes(text)
        write_checkpoint(in_file, out)
    return len(written)


def print_result(args, converted, inferred, arguments, windows, count):
    """Print what was read, what was left out and what was written, with warnings to the standard error."""
    weights, last = converted.weights, len(windows) - 1
    left_out = [f'{number} {why}' for why, number in Counter(converted.left_out.values()).items()]
    if args.to:
        norms = sum(name.startswith('norm') and not name.startswith(f'norm{last}.') for name in weights)
        left_out += [f'{norms} of output norms, which {args.to} does not have'] if norms else []
    if args.pretrained_window_sizes and inferred.origin and windows != inferred.pretrained_window_sizes:
        print(
            f'warning: {inferred.origin} says windows {inferred.pretrained_window_sizes}, and '
            f'--pretrained-window-sizes {windows} are stored: the position bias is wrong unless they are right',
            file=sys.stderr,
        )
    if args.to and EXPORTS[args.to].needs_last_norm and f'norm{last}.weight' not in weights:
        print(
            f'warning: {args.input} has no norm after its last stage: one is written as {args.to} needs it, untrained',
            file=sys.stderr,
        )
    origin = '--pretrained-window-sizes' if args.pretrained_window_sizes else inferred.origin
    print(f'read {args.input}: {converted.format}, arch={arguments["arch"]!r}')
    print(f'pretrained windows {windows}, said by {origin}; left out: {", ".join(left_out) or "nothing"}')
    print(f'wrote {count} tensors, {os.path.getsize(args.output) / 1e6:.1f} MB, to {args.output}')


def main() -> int:
    args = parse_args()
    out = Path(args.output)
    try:
        check_suffix(out)
        converted, inferred = read_weights(args.input, args.prefix)
        with named_in_errors(args.input):
            arguments = check_complete(converted, inferred, SwinTransformerV2)
            num_stages, position_bias = len(parse_arch(arguments['arch']).depths), arguments['position_bias']
            windows = choose_windows(inferred, args.pretrained_window_sizes, num_stages, position_bias)
        out.parent.mkdir(parents=True, exist_ok=True)
        count = write(converted.weights, windows, args.to, out)
    except (CheckpointError, OSError) as error:
        return bad_input(error)
    print_result(args, converted, inferred, arguments, windows, count)
    return 0


if __name__ == '__main__':
    sys.exit(ending.run(main))
