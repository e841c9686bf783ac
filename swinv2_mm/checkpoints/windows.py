"""Which windows a checkpoint was trained with, stage by stage: what normalises its position MLPs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..arch import ARCHS, parse_arch
from ..messages import warn
from ..position_bias import linear_spaced_coordinates, log_spaced_coordinates
from .files import CheckpointError

COORDS_TABLE = re.compile(r'layers\.(\d+)\.blocks\.\d+\.attn\.relative_coords_table$')
# window12to16_192to256, window8-256, and not window16_36e or window8_20240131
IN_NAME = re.compile(r'window(\d+)(?:to(\d+))?[_-](\d{3,4})(?:to(\d{3,4}))?(?![0-9A-Za-z])')
COMPUTED_HERE = {  # what a config states and weights do not show, and the values of it that give those of our backbone
    'hidden_act': ('gelu', 'gelu_python'),  # of transformers, as the next two
    'layer_norm_eps': (1e-5,),
    'use_absolute_embeddings': (False,),
    'act_layer': ('gelu',),  # of timm, as the next, whose own LayerNorm has another epsilon
    'norm_layer': (),
}
MAX_WINDOW = 2**16 - 1  # tokens
MALFORMED = OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError


class TrainedWindows(NamedTuple):
    """What is known of a checkpoint's windows, one per stage, in tokens."""

    pretrained_window_sizes: tuple[int, ...] | None = None
    window_size: tuple[int, ...] | None = None  # that it attended in
    origin: str | None = None  # what says so


def infer_windows(
    stated: Tensor | None,
    tables: Mapping[str, Tensor],
    source: str | os.PathLike | None,
    arguments: Mapping,
) -> TrainedWindows:
    """The windows of a checkpoint, by what it holds, else by its name, else by the ``config.json`` beside it.

    Where two of them differ, a warning is logged.

    Args:
        stated (Tensor, optional): the buffer ``pretrained_windows`` of our own checkpoints.
        tables (Mapping): the ``relative_coords_table`` buffers, by their names in the official layout.
        source (str, optional): path of the file.
        arguments (Mapping): what `infer_arguments` says of the checkpoint.

    Returns:
        TrainedWindows: empty if nothing says them.

    Raises:
        CheckpointError: the buffer or a table is damaged, or the weights are of a model that is not computed here.
    """
    num_stages, patch_size = len(parse_arch(arguments['arch']).depths), arguments['patch_size']
    says = [windows_stated(stated) if stated is not None else windows_from_tables(tables, num_stages)]
    if source:
        config = os.path.join(os.path.dirname(source), 'config.json')
        says.append(windows_from_name(os.path.basename(source), num_stages, patch_size))
        says.append(windows_from_config(config, num_stages, patch_size, arguments))
    says = [windows for windows in says if windows.origin]
    for other in says[1:]:
        if other.pretrained_window_sizes != says[0].pretrained_window_sizes:
            warn(
                f'{says[0].origin} says that {source} was trained with windows {says[0].pretrained_window_sizes}, '
                f'{other.origin} says {other.pretrained_window_sizes}: the former is used'
            )
    return says[0] if says else TrainedWindows()


def windows_stated(stated: Tensor) -> TrainedWindows:
    """The windows in the buffer ``pretrained_windows`` of our own checkpoints, (stages,).

    Raises:
        CheckpointError: it holds no window sizes.
    """
    is_list = stated.ndim == 1 and stated.numel() < 100 and not stated.is_complex() and stated.dtype != torch.bool
    values = stated.double() if is_list else None  # half of a model in half
    if values is None or not ((values == values.round()) & (values >= 1) & (values <= MAX_WINDOW)).all():
        raise CheckpointError(
            f'pretrained_windows in the file must be whole numbers from 1 on, one per stage, got {stated.dtype} '
            f'{stated.flatten()[:8].tolist()}: the file is damaged, save it again'
        )
    return TrainedWindows(tuple(map(int, values.tolist())), origin='pretrained_windows in the file')


def windows_from_tables(tables: Mapping[str, Tensor], num_stages: int) -> TrainedWindows:
    """The windows that normalised the tables of log-spaced coordinates which official checkpoints hold.

    The corner of a table, the offset of a whole window W, is ``log2(1 + 8 (W-1) / (P-1)) / 3`` where P is the window
    that normalised it; the table of that P is then compared with all of it. A window of one token has one offset, 0,
    and says nothing but itself.

    Args:
        tables (Mapping): (1, 2W-1, 2W-1, 2) or (2W-1, 2W-1, 2) by name, ``layers.I.blocks.J.attn.`` and so on.
        num_stages (int): stages of the checkpoint.

    Returns:
        TrainedWindows: empty if a stage has no table.

    Raises:
        CheckpointError: a table is of no window, or two of a stage differ.
    """
    found = {}
    for name, table in tables.items():
        match = COORDS_TABLE.match(name)
        if not match:
            raise CheckpointError(f'{name} is of no block: the file is damaged')
        stage = int(match[1])
        windows = _windows_of_table(name, table)
        if found.setdefault(stage, windows) != windows:
            raise CheckpointError(f'{name} is of window {windows}, other tables of its stage of {found[stage]}')
    if set(found) != set(range(num_stages)):
        return TrainedWindows()
    pretrained, windows = zip(*(found[stage] for stage in range(num_stages)))
    return TrainedWindows(pretrained, windows, 'relative_coords_table in the file')


def _windows_of_table(name, table):
    """The window that normalised a table, and its own."""
    if table.is_meta or table.layout != torch.strided:
        raise CheckpointError(f'{name} holds no dense values: the file is damaged')
    side = table.shape[-2] if table.ndim >= 3 else 0
    window = (side + 1) // 2
    if side % 2 == 0 or table.shape[-3:] != (side, side, 2) or table.numel() != 2 * side**2:
        raise CheckpointError(f'{name} must be (1, 2W-1, 2W-1, 2) for a window W, got {tuple(table.shape)}')
    if window == 1:
        return 1, 1
    table = table.double().view(side, side, 2)
    corner = table[-1, -1, 0].item()
    if 1e-4 < corner < 4:  # windows from thousands of times smaller to 512 times larger than the pretrained one
        pretrained = 1 + round(8 * (window - 1) / (2 ** (3 * corner) - 1))
        precise = log_spaced_coordinates(window, window, pretrained, dtype=torch.float64)
        if pretrained > 1 and torch.allclose(table, precise, rtol=1 / 128, atol=1e-4 * corner):  # bfloat16 at worst
            return pretrained, window
    linear = linear_spaced_coordinates(window, window, window, dtype=torch.float64)
    kind = 'linear-spaced' if torch.allclose(table / table.abs().max(), linear, atol=0.01) else 'not log-spaced'
    raise CheckpointError(f'{name} holds {kind} coordinates: the file is damaged or no Swin V2')


def windows_from_name(name: str, num_stages: int, patch_size: int = 4) -> TrainedWindows:
    """The windows that the official and timm's names of checkpoints state.

    ``window12to16_192to256`` was trained with window 12 at 192 pixels and fine-tuned with 16 at 256, and keeps the
    normaliser of the former. A window is as large as the map of its stage at most.
    """
    numbers = _numbers_in(name)
    if not numbers:
        return TrainedWindows()
    window, new_window, image, new_image = numbers
    pretrained = _clamped(window, image, num_stages, patch_size)
    windows = _clamped(new_window, new_image, num_stages, patch_size)
    return TrainedWindows(pretrained, windows, 'the name of the file') if pretrained and windows else TrainedWindows()


def _numbers_in(name):
    """Window before and after fine-tuning, and the image size in pixels before and after."""
    match = IN_NAME.search(name)
    if not match:
        return None
    window, new_window, image, new_image = match.groups()
    return int(window), int(new_window or window), int(image), int(new_image or image)


def windows_from_config(
    path: str | os.PathLike, num_stages: int, patch_size: int = 4, arguments: Mapping | None = None
) -> TrainedWindows:
    """The windows that the ``config.json`` of transformers or timm states.

    Empty if the file is neither, or, with a warning, if it is of another architecture than ``arguments``. In both
    libraries a pretrained window of 0 is the window itself.

    Raises:
        CheckpointError: it states what weights do not show, and what this backbone does not compute.
    """
    try:
        with open(path, encoding='utf-8') as file:
            config = json.load(file)
        is_timm = 'architecture' in config
        stated = _stated_by_timm(config, num_stages) if is_timm else _stated_by_transformers(config)
        others = _differences(stated, arguments) if arguments else []
    except MALFORMED:
        return TrainedWindows()
    if others:
        warn(f'{path} describes another model than the checkpoint ({", ".join(others)}), and is ignored')
        return TrainedWindows()
    for key, values in COMPUTED_HERE.items():
        if stated.get(key) not in (None, *values):
            raise CheckpointError(
                f'{path} says {key}={stated[key]!r}, which is not computed here'
                f'{f", but {values[0]!r}" if values else ""}: use the library that wrote it; if it is of other '
                'weights, move it to another folder'
            )
    try:
        windows = [_windows_of_side(stated, side, num_stages, patch_size) for side in (0, 1)]
        if windows[0] is None or (is_timm and windows[0] != windows[1]):
            return TrainedWindows()  # timm normalises rows and columns by windows of their own
        given = stated.get('pretrained_window_sizes') or (0,) * num_stages
        pretrained = tuple(_pair(given[i])[0] or windows[0][i] for i in range(num_stages))
    except MALFORMED:
        return TrainedWindows()
    return TrainedWindows(pretrained, windows[0], 'config.json beside the file')


def _windows_of_side(stated, side, num_stages, patch_size):
    """The windows that a config states, in height or width."""
    window, image = _pair(stated['window_size'])[side], _pair(stated['image_size'])[side]
    if stated.get('always_partition'):  # timm then has windows that are larger than their map
        image = patch_size * 2**num_stages * window
    return _clamped(window, image, num_stages, patch_size)


def _stated_by_transformers(config):
    config = config.get('backbone_config') or config  # of a detector or segmentor
    return config if config.get('model_type') == 'swinv2' else {}


def _stated_by_timm(config, num_stages):
    """What the name of an architecture says, and the arguments that replace it, under the names of transformers."""
    window, new_window, image, new_image = _numbers_in(config['architecture'])
    stated = {'window_size': new_window, 'image_size': new_image}
    if new_window != window:
        stated['pretrained_window_sizes'] = _clamped(window, image, num_stages, 4)
    for size, arch in ARCHS.items():
        if f'_{size}_' in config['architecture']:
            stated.update(embed_dim=arch.embed_dims, depths=arch.depths, num_heads=arch.num_heads)
    arguments = config.get('model_args') or {}
    return {**stated, **arguments, 'image_size': arguments.get('img_size', new_image)}


def _differences(stated, arguments):
    """What a config states of the architecture, and the weights show otherwise."""
    arch, channels, patch_size = (arguments[key] for key in ('arch', 'in_channels', 'patch_size'))
    arch = parse_arch(arch)
    widest = arch.embed_dims * 2 ** (len(arch.depths) - 1)
    actual = {
        'embed_dim': arch.embed_dims,
        'depths': arch.depths,
        'num_heads': arch.num_heads,
        'patch_size': patch_size,
        'num_channels': channels,  # of transformers
        'in_chans': channels,  # of timm
        'qkv_bias': arguments['qkv_bias'],
        'mlp_ratio': int(arguments['mlp_ratio'] * widest),
    }
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in stated.items()}
    if 'mlp_ratio' in given:
        given['mlp_ratio'] = int(given['mlp_ratio'] * widest)
    if given.get('patch_size') == (patch_size, patch_size):
        given['patch_size'] = patch_size
    return [f'{key} {stated[key]}' for key in actual if key in given and given[key] != actual[key]]


def _pair(size):
    """Height and width of one int or two."""
    pair = size if isinstance(size, list) else [size, size]
    if len(pair) != 2 or any(type(side) is not int or not 0 <= side <= MAX_WINDOW for side in pair):
        raise ValueError(size)
    return pair


def _clamped(window, image, num_stages, patch_size):
    """A window per stage, none larger than the map of its stage at an image size in pixels; None if a map is empty."""
    maps = [image // patch_size // 2**i for i in range(num_stages)]
    return tuple(min(window, size) for size in maps) if window > 0 and min(maps) > 0 else None
