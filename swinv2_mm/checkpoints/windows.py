"""Which windows a checkpoint was trained with, stage by stage: they scale the coordinates of its position MLPs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..arch import MAX_WINDOW, parse_arch
from ..messages import warn
from ..position_bias import POSITION_BIASES, linear_spaced_coordinates, log_spaced_coordinates
from .file_names import limit_to_maps, sizes_in_name
from .files import CheckpointError
from .formats import FORMATS

COORDS_TABLE = re.compile(r'layers\.(\d+)\.blocks\.\d+\.attn\.relative_coords_table$')
CONFIG_FILES = tuple(format_.config for format_ in FORMATS if format_.config)
COMPUTED_HERE = {key: values for config in CONFIG_FILES for key, values in config.computed_here.items()}
MALFORMED = OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError


class TrainedWindows(NamedTuple):
    """What is known about a checkpoint's windows, one per stage, in tokens."""

    pretrained_window_sizes: tuple[int, ...] | None = None
    window_size: tuple[int, ...] | None = None  # in which it attended
    origin: str | None = None  # what says so


def infer_windows(
    buffer: Tensor | None,
    tables: Mapping[str, Tensor],
    source: str | os.PathLike | None,
    arguments: Mapping,
) -> TrainedWindows:
    """Find the windows of a checkpoint: in what it holds, else in its name, else in the ``config.json`` beside it.

    If two of them differ, a warning is logged.

    Args:
        buffer (Tensor, optional): ``pretrained_windows`` of our own checkpoints, (stages,).
        tables (Mapping): the ``relative_coords_table`` buffers, by our names.
        source (str, optional): path of the file.
        arguments (Mapping): of the backbone, as `infer_arguments` gives them.

    Returns:
        TrainedWindows: empty if nothing says them.

    Raises:
        CheckpointError: the buffer or a table is damaged, or the weights are of a model that is not computed here.
    """
    num_stages, patch_size = len(parse_arch(arguments['arch']).depths), arguments['patch_size']
    found = [windows_from_buffer(buffer) if buffer is not None else windows_from_tables(tables, num_stages)]
    if source:
        config = os.path.join(os.path.dirname(source), 'config.json')
        found.append(windows_from_name(os.path.basename(source), num_stages, patch_size))
        found.append(windows_from_config(config, num_stages, patch_size, arguments))
    found = [windows for windows in found if windows.origin]
    for other in found[1:]:
        if other.pretrained_window_sizes != found[0].pretrained_window_sizes:
            warn(
                f'{found[0].origin} says that {source} was trained with windows {found[0].pretrained_window_sizes}, '
                f'{other.origin} says {other.pretrained_window_sizes}: the first is used'
            )
    return found[0] if found else TrainedWindows()


def windows_from_weights(weights: Mapping[str, Tensor], arguments: Mapping) -> TrainedWindows:
    """The windows that the shapes of position biases show, where these have no pretrained window as a setting.

    Args:
        weights (Mapping): tensors by our names.
        arguments (Mapping): of the backbone, as `infer_arguments` gives them.

    Returns:
        TrainedWindows: empty if the bias of a stage is missing.

    Raises:
        CheckpointError: the shape of a bias fits no window.
    """
    bias, windows = POSITION_BIASES[arguments['position_bias']], []
    for i in range(len(parse_arch(arguments['arch']).depths)):
        prefix = f'layers.{i}.blocks.0.attn.{bias.name}.'
        parts = {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
        try:
            windows.append(bias.window_of(parts))
        except ValueError as error:
            raise CheckpointError(f'{error}: the file is damaged') from None
    if None in windows:
        return TrainedWindows()
    return TrainedWindows(tuple(windows), tuple(windows), 'the shape of the tables')


def windows_from_buffer(buffer: Tensor) -> TrainedWindows:
    """The windows in the buffer ``pretrained_windows`` of our own checkpoints, (stages,).

    Raises:
        CheckpointError: it holds no window sizes.
    """
    is_list = buffer.ndim == 1 and buffer.numel() < 100 and not buffer.is_complex() and buffer.dtype != torch.bool
    values = buffer.double() if is_list else None  # it is half precision in a model that was cast to it
    if values is None or not ((values == values.round()) & (values >= 1) & (values <= MAX_WINDOW)).all():
        raise CheckpointError(
            f'pretrained_windows in the file must be whole numbers from 1 on, one per stage, got {buffer.dtype} '
            f'{buffer.flatten()[:8].tolist()}: the file is damaged, save it again'
        )
    return TrainedWindows(tuple(map(int, values.tolist())), origin='pretrained_windows in the file')


def windows_from_tables(tables: Mapping[str, Tensor], num_stages: int) -> TrainedWindows:
    """The windows that the tables of log-spaced coordinates in official checkpoints show.

    The corner of a table, which is the largest offset in a window of W tokens, is ``log2(1 + 8 (W-1) / (P-1)) / 3``
    where P is the pretrained window. The whole table is then compared with that of P. A window of one token has only
    the offset 0, which is the same for any P.

    Args:
        tables (Mapping): (1, 2W-1, 2W-1, 2) or (2W-1, 2W-1, 2), by our names: ``layers.I.blocks.J.attn.`` and so on.
        num_stages (int): stages of the checkpoint.

    Returns:
        TrainedWindows: empty if a stage has no table.

    Raises:
        CheckpointError: a table fits no window, or two tables of a stage differ.
    """
    found = {}
    for name, table in tables.items():
        match = COORDS_TABLE.match(name)
        if not match:
            raise CheckpointError(f'{name} is not in a block: the file is damaged')
        stage = int(match[1])
        windows = _windows_of_table(name, table)
        if found.setdefault(stage, windows) != windows:
            raise CheckpointError(
                f'{name} shows the pretrained window and window {windows}, another table of its stage {found[stage]}: '
                'the file is damaged'
            )
    if set(found) != set(range(num_stages)):
        return TrainedWindows()
    pretrained, windows = zip(*(found[stage] for stage in range(num_stages)))
    return TrainedWindows(pretrained, windows, 'relative_coords_table in the file')


def _windows_of_table(name, table):
    """The pretrained window that a table shows, and its own window, in tokens."""
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
    raise CheckpointError(f'{name} holds {kind} coordinates: the file is damaged or not a Swin V2')


def windows_from_name(name: str, num_stages: int, patch_size: int = 4) -> TrainedWindows:
    """The windows in the name of a checkpoint that the official repository or timm released.

    ``window12to16_192to256`` was trained with window 12 at 192 pixels and fine-tuned with 16 at 256; its pretrained
    window is 12. A window is at most as large as the map of its stage.

    Args:
        name (str): name of the file.
        num_stages (int): stages of the checkpoint.
        patch_size (int): stride of the first stage in pixels.

    Returns:
        TrainedWindows: empty if the name says none.
    """
    sizes = sizes_in_name(name)
    if not sizes:
        return TrainedWindows()
    window, new_window, image, new_image = sizes
    pretrained = limit_to_maps(window, image, num_stages, patch_size)
    windows = limit_to_maps(new_window, new_image, num_stages, patch_size)
    return TrainedWindows(pretrained, windows, 'the name of the file') if pretrained and windows else TrainedWindows()


def windows_from_config(
    path: str | os.PathLike, num_stages: int, patch_size: int = 4, arguments: Mapping | None = None
) -> TrainedWindows:
    """The windows in the ``config.json`` of transformers or timm.

    In both libraries a pretrained window of 0 means the window itself.

    Args:
        path (str): path of the file, which need not exist.
        num_stages (int), patch_size (int): as in `windows_from_name`.
        arguments (Mapping, optional): of the backbone, as `infer_arguments` gives them, to compare with.

    Returns:
        TrainedWindows: empty if the file is of neither library, or, with a warning, of another model than
        ``arguments``.

    Raises:
        CheckpointError: the file has a setting that weights do not show and this backbone does not compute.
    """
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
        read = ((config, config.read(content, num_stages)) for config in CONFIG_FILES)
        library, settings = next((pair for pair in read if pair[1] is not None), (None, None))
        if library is None:
            return TrainedWindows()
        differences = _differences(settings, arguments) if arguments else []
    except MALFORMED:
        return TrainedWindows()
    if differences:
        warn(f'{path} describes another model than the checkpoint ({", ".join(differences)}), and is ignored')
        return TrainedWindows()
    _check_computed_here(path, settings)
    try:
        rows, columns = (_windows_of_axis(settings, axis, num_stages, patch_size) for axis in (0, 1))
        if rows is None or (library.per_axis and rows != columns):
            return TrainedWindows()
        given = settings.get('pretrained_window_sizes') or (0,) * num_stages
        pretrained = tuple(_pair(given[i])[0] or rows[i] for i in range(num_stages))
    except MALFORMED:
        return TrainedWindows()
    return TrainedWindows(pretrained, rows, 'config.json beside the file')


def _check_computed_here(path, settings):
    for key, values in COMPUTED_HERE.items():
        if settings.get(key) not in (None, *values):
            raise CheckpointError(
                f'{path} says {key}={settings[key]!r}, and this backbone computes '
                f'{f"{key}={values[0]!r}" if values else "the default"}: use the library that wrote the file; if it is '
                'of other weights, move it to another folder'
            )


def _windows_of_axis(settings, axis, num_stages, patch_size):
    """The windows of a config in height (0) or width (1), one per stage."""
    window, image = _pair(settings['window_size'])[axis], _pair(settings['image_size'])[axis]
    if settings.get('always_partition'):  # timm then has windows that are larger than their map
        image = patch_size * 2**num_stages * window
    return limit_to_maps(window, image, num_stages, patch_size)


def _differences(settings, arguments):
    """Settings of a config that contradict the arguments which the weights show."""
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
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    if 'mlp_ratio' in given:
        given['mlp_ratio'] = int(given['mlp_ratio'] * widest)
    if given.get('patch_size') == (patch_size, patch_size):
        given['patch_size'] = patch_size
    return [f'{key} {settings[key]}' for key in actual if key in given and given[key] != actual[key]]


def _pair(size):
    """Height and width of one int or two."""
    pair = size if isinstance(size, list) else [size, size]
    if len(pair) != 2 or any(type(side) is not int or not 0 <= side <= MAX_WINDOW for side in pair):
        raise ValueError(size)
    return pair
