"""Say what a checkpoint is, which windows it was trained with, and whether it loads. It takes no memory for a model."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tools/, which has swinv2_tools/
from swinv2_tools import ending  # isort: split

import argparse
from collections import Counter
from inspect import signature

from swinv2_mm import CheckpointError, SwinTransformerV2
from swinv2_mm.arch import parse_arch
from swinv2_mm.checkpoints.fitting import check_complete
from swinv2_mm.checkpoints.loading import named_in_errors, read_weights
from swinv2_mm.engine.launch import PREFIX_HELP, bad_input

DEFAULTS = {name: parameter.default for name, parameter in signature(SwinTransformerV2).parameters.items()}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='example: python tools/model_converters/inspect_checkpoint.py '
        'swinv2_base_patch4_window12to16_192to256_22kto1k_ft.pth; the exit code is 0 if it loads, as its last line '
        'says, else 2',
    )
    parser.add_argument('file', metavar='FILE', help='path or URL of a checkpoint')
    parser.add_argument('--prefix', default='', metavar='NAME', help=PREFIX_HELP)
    return parser.parse_args(argv)


def describe_tensors(converted) -> list[tuple[str, str]]:
    """Lines that do not depend on the architecture."""
    weights, left_out = converted.weights, Counter(converted.left_out.values())
    dtypes = sorted({str(value.dtype).replace('torch.', '') for value in weights.values()})
    norms = sorted({name.split('.')[0] for name in weights if name.startswith('norm')})
    return [
        ('format', converted.format),
        ('parameters', f'{sum(value.numel() for value in weights.values()) / 1e6:.2f} M in {len(weights)} tensors'),
        ('dtype', ', '.join(dtypes)),
        ('output norms', ', '.join(norms) or 'none'),
        ('rearranged', ', '.join(sorted(set(converted.rearranged.values()))) or 'nothing'),
        ('left out', ', '.join(f'{count} {why}' for why, count in left_out.items()) or 'nothing'),
    ]


def describe_backbone(arguments, windows) -> list[tuple[str, str]]:
    """Lines on the architecture, the windows of each stage, and how to build the backbone."""
    arch = parse_arch(arguments['arch'])
    stages = range(len(arch.depths))
    unknown = ('?',) * len(stages)
    per_stage = [
        ('', [f'stage {i}' for i in stages]),
        ('channels', [arch.embed_dims * 2**i for i in stages]),
        ('blocks', arch.depths),
        ('heads', arch.num_heads),
        ('window', windows.window_size or unknown),
        ('pretrained window', windows.pretrained_window_sizes or unknown),
    ]
    call = {key: value for key, value in arguments.items() if key == 'arch' or value != DEFAULTS[key]}
    call = [f'{key}={value!r}' for key, value in call.items()]
    if windows.pretrained_window_sizes is None:
        call.append('pretrained_window_sizes=...')
    named = isinstance(arguments['arch'], str)
    return [
        ('architecture', arguments['arch'] if named else 'none with a name'),
        ('position bias', arguments['position_bias']),
        *((title, ''.join(str(value).rjust(9) for value in values)) for title, values in per_stage),
        ('windows said by', windows.origin or 'nothing'),
        ('loads', f'into SwinTransformerV2({", ".join(call)})'),
    ]


def main() -> int:
    args = parse_args()
    lines, problem = [], None
    try:
        converted, windows = read_weights(args.file, args.prefix)
        lines = describe_tensors(converted)
        with named_in_errors(args.file):
            arguments = check_complete(converted, windows, SwinTransformerV2)
        lines += describe_backbone(arguments, windows)
    except CheckpointError as error:
        problem = error
    for title, value in lines:
        print(f'{title.ljust(18)} {value}')
    if problem:
        return bad_input(problem)
    return 0


if __name__ == '__main__':
    sys.exit(ending.run(main))
