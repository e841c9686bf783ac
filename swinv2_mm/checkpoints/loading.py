"""Loading a checkpoint of any published layout into the backbone, whole or not at all, with a report."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from ..arch import arch_argument, infer_arguments, parameter_shapes, parse_arch
from ..position_bias import resize_table, table_window
from .files import CheckpointError, local_path, printable, read_checkpoint
from .formats import Converted, convert
from .windows import TrainedWindows, infer_windows

PATCH_FILTERS = 'patch_embed.proj.weight'
UNBUILT = 'of a stage after the last of out_indices, which is not built'
BIAS_TABLE = 'attn.relative_position_bias_table.weight'


class LoadReport(NamedTuple):
    """What `load_pretrained` did with a checkpoint. As a string, a small table.

    Window sizes are per stage, in tokens; those of the checkpoint are None where nothing says them.
    """

    source: str  # the path or URL
    format: str  # official, SimMIM, timm, timm features_only, transformers, torchvision, mmpretrain or swinv2_mm
    place: str  # where in the checkpoint the weights were, e.g. state_dict/backbone.
    loaded: tuple[str, ...]  # names in the backbone whose values are those of one tensor of the file
    converted: dict[str, str]  # names in the backbone whose values were rearranged: how
    left_out: dict[str, str]  # names in the file that the backbone does not get: why
    initial: dict[str, str]  # names in the backbone that stay at their initial value: why
    checkpoint_window_size: tuple[int, ...] | None
    window_size: tuple[int, ...]  # of the backbone
    checkpoint_pretrained_window_sizes: tuple[int, ...] | None
    pretrained_window_sizes: tuple[int, ...]  # of the backbone: the normaliser of its position MLPs
    origin: str  # what says the pretrained windows

    def __str__(self):
        stages = range(len(self.window_size))
        rows = [('', *(f'stage {i}' for i in stages), '')]
        for title, before, after, remark in (
            ('window', self.checkpoint_window_size, self.window_size, ''),
            ('normaliser', self.checkpoint_pretrained_window_sizes, self.pretrained_window_sizes, self.origin),
        ):
            before = before or ('?',) * len(stages)
            rows.append((title, *(f'{old} -> {new}' for old, new in zip(before, after)), remark))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        listed = {
            'loaded': self.loaded,
            'converted': self.converted,
            'left out': self.left_out,
            'initial': self.initial,
        }
        lines += [f'{title.ljust(widths[0])}  {count(names)}' for title, names in listed.items()]
        place = f', found at {self.place}' if self.place else ''
        lines = [f'Loaded {self.source} (format: {self.format}{place})', *(f'  {line}' for line in lines)]
        return '\n'.join(map(printable, lines))


def count(names: Mapping[str, str] | Sequence[str]) -> str:
    """`4 tensors: 2 classifier (head.weight, ...), 2 ...` for names with reasons, just the number without."""
    if not isinstance(names, Mapping) or not names:
        return f'{len(names)} tensors'
    reasons = []
    for reason, number in Counter(names.values()).items():
        first = next(name for name in names if names[name] == reason)
        reasons.append(f'{number} {reason} ({first}{", ..." if number > 1 else ""})')
    return f'{len(names)} tensors: {"; ".join(reasons)}'


def load_pretrained(
    backbone: nn.Module,
    source: str | os.PathLike | Mapping,
    allow_missing: str | Sequence[str] = (),
    prefix: str = '',
) -> LoadReport:
    """Load weights of any published layout into the backbone, and log a report.

    Takes what the official repository (also of SimMIM), timm, transformers, torchvision, mmpretrain, OpenMMLab
    detectors and segmentors with this backbone, and `tools/model_converters/convert_checkpoint.py` save. Everything but output norms
    must be there, in the right shape; else nothing is loaded. The windows that the position MLPs were trained with
    become ``pretrained_window_sizes``, unless the backbone was given that argument. The backbone keeps its window size.

    Args:
        backbone (SwinTransformerV2): the backbone to load into.
        source (str | Mapping): a path, a URL or a state dict.
        allow_missing (str | Sequence[str]): names of parameters or modules of the backbone that may stay at their
            initial value if the file lacks them or has them in another shape. With ``patch_embed.proj``, for images of
            other channels, the filters of the channels that both have stay, or become their sum for one channel. The
            patch embedding must be there in some shape: it tells the layout.
        prefix (str): which backbone to take where the file holds several, such as ``teacher``: the start of its names,
            or the keys of the dicts around them.

    Returns:
        LoadReport: what was loaded, converted, left out and left as it was, and the windows.

    Raises:
        CheckpointError: the file can't be read (`read_checkpoint`), holds no Swin V2 or one that does not fit the
            backbone, or nothing says which windows it was trained with.
        ValueError: the backbone is on the meta device.
    """
    weights, report = fit_pretrained(backbone, source, allow_missing, prefix)
    if any(parameter.is_meta for parameter in backbone.parameters()):
        raise ValueError(
            "the backbone is on the meta device, where there are no values: call backbone.to_empty(device='cpu') before"
        )
    backbone.load_state_dict(weights, strict=False)
    print_log(str(report), logger='current')
    return report


def fit_pretrained(
    backbone: nn.Module,
    source: str | os.PathLike | Mapping,
    allow_missing: str | Sequence[str] = (),
    prefix: str = '',
) -> tuple[dict[str, Tensor], LoadReport]:
    """Read the weights that `load_pretrained` loads, and check that they fit; changes nothing.

    Args and errors as `load_pretrained`; the backbone may be on the meta device.

    Returns:
        tuple: the weights by name in the backbone, and the report of loading them.
    """
    if not hasattr(backbone, 'pretrained_windows_given'):
        raise TypeError(
            f'load_pretrained loads into a SwinTransformerV2, got {type(backbone).__name__}: pass model.backbone'
        )
    allowed = (allow_missing,) if isinstance(allow_missing, str) else tuple(allow_missing)
    converted, windows = read_weights(source, prefix)
    with naming(source):
        weights, rearranged, left_out, initial = fit(backbone, converted, windows, allowed)
    keeps_own = backbone.pretrained_windows_given or backbone.position_bias == 'parameterized'
    own_windows = backbone.pretrained_window_sizes if keeps_own else tuple(weights['pretrained_windows'].tolist())
    return weights, LoadReport(
        source=_label(source),
        format=converted.format,
        place=converted.place,
        loaded=tuple(name for name in weights if name not in rearranged and name != 'pretrained_windows'),
        converted=rearranged,
        left_out=left_out,
        initial=initial,
        checkpoint_window_size=windows.window_size,
        window_size=backbone.window_size,
        checkpoint_pretrained_window_sizes=windows.pretrained_window_sizes,
        pretrained_window_sizes=own_windows,
        origin='the argument pretrained_window_sizes' if backbone.pretrained_windows_given else windows.origin,
    )


def read_weights(source: str | os.PathLike | Mapping, prefix: str = '') -> tuple[Converted, TrainedWindows]:
    """The weights of a checkpoint in our layout, and its windows as far as something says them.

    Args:
        source (str | Mapping): a path, a URL or a state dict.
        prefix (str): as in `load_pretrained`.

    Raises:
        CheckpointError: it can't be read, or holds no Swin V2.
    """
    checkpoint = source if isinstance(source, Mapping) else read_checkpoint(source)
    with naming(source):
        return convert_with_windows(checkpoint, None if isinstance(source, Mapping) else local_path(source), prefix)


def convert_with_windows(checkpoint: Mapping, path: str | None, prefix: str = '') -> tuple[Converted, TrainedWindows]:
    """`read_weights` of what a file holds; its path may say the windows."""
    converted = convert(checkpoint, prefix)
    stated = converted.weights.pop('pretrained_windows', None)
    arguments = infer_arguments(converted.weights)
    if arguments is None:  # incomplete: the rest tells nothing, and fits no backbone
        return converted, TrainedWindows()
    if arguments['position_bias'] == 'parameterized':
        return converted, _windows_of_parameterized(converted.weights, len(parse_arch(arguments['arch']).depths))
    return converted, infer_windows(stated, converted.tables, path, arguments)


def check_complete(converted: Converted, windows: TrainedWindows) -> dict:
    """Check that weights are all of some backbone, in the right shapes, without building one.

    Returns:
        dict: the arguments of the `SwinTransformerV2` that takes them, as `infer_arguments`.

    Raises:
        CheckpointError: a parameter is missing, misshapen, unknown or no finite number.
    """
    weights = converted.weights
    arguments = infer_arguments(weights)
    if arguments is None:
        raise CheckpointError(
            'it lacks weights that tell its architecture, in its first block or the logit_scale of a stage'
        )
    arch = parse_arch(arguments['arch'])
    if windows.pretrained_window_sizes and len(windows.pretrained_window_sizes) != len(arch.depths):
        raise CheckpointError(f'it has {len(arch.depths)} stages and the windows {windows.pretrained_window_sizes}')
    shapes = parameter_shapes(**arguments, window_size=windows.window_size)
    for i in range(len(arch.depths)):
        if any(name.startswith(f'norm{i}.') for name in weights):
            shapes.update(dict.fromkeys((f'norm{i}.weight', f'norm{i}.bias'), (arch.embed_dims * 2**i,)))
    _check_names(shapes, weights, arguments, arguments)
    for name, value in weights.items():
        _check_values(name, value, value.dtype)
    return arguments


def _windows_of_parameterized(weights, num_stages):
    tables = [weights.get(f'layers.{i}.blocks.0.{BIAS_TABLE}') for i in range(num_stages)]
    if any(table is None for table in tables):
        return TrainedWindows()
    windows = tuple(_table_window(table) for table in tables)
    return TrainedWindows(windows, windows, 'the shape of the tables')


def _table_window(table):
    try:
        return table_window(table)
    except ValueError as error:
        raise CheckpointError(f'{error}: the file is damaged') from None


def _resized(table, window):
    _table_window(table)
    return resize_table(table, window)


def _with_channels(filters, own):
    """(C, channels, P, P) for the channels of the backbone's own, and what was done; as they are if nothing fits.

    The sum over RGB gives a grey image the features that it has as RGB.
    """
    given, wanted = filters.shape[1:2].numel(), own.shape[1]
    if given == wanted or filters.ndim != 4 or filters[:, 0].shape != own[:, 0].shape:
        return filters, None
    if wanted == 1:
        return filters.sum(1, keepdim=True), f'filters of {given} channels summed'
    rest = torch.zeros_like(own, device='cpu') if own.is_meta else own.detach().cpu()
    kept = torch.cat([filters[:, :wanted], rest[:, given:].to(filters.dtype)], 1)
    return kept, f'filters of the first {min(given, wanted)} channels kept, {max(wanted - given, 0)} initial'


def fit(
    backbone: nn.Module, converted: Converted, windows: TrainedWindows, allow_missing: Sequence[str] = ()
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str], dict[str, str]]:
    """Fit weights in our layout to a backbone, which may be on the meta device; changes nothing.

    Returns:
        tuple: the weights to load, and of the names of each with reasons: those that were rearranged, those in the file
        that are left out, those that stay initial in the backbone.

    Raises:
        CheckpointError: anything that the backbone needs is missing, misshapen or no finite number, or the file holds
            what the backbone does not know, or nothing says the windows.
    """
    weights, rearranged, left_out, initial = _fit(backbone, converted, allow_missing)
    if backbone.position_bias != 'parameterized':
        pretrained_windows = backbone.of_built_stages(windows.pretrained_window_sizes or ())
        if pretrained_windows:
            weights['pretrained_windows'] = torch.tensor(pretrained_windows)
        elif not backbone.pretrained_windows_given:
            raise CheckpointError(
                'nothing says the windows that each stage was trained with: pass pretrained_window_sizes, for '
                'example (16, 16, 16, 8) for window 16 at 256 pixels'
            )
    return weights, rearranged, left_out, initial


def _fit(backbone, converted, allow_missing):
    own = {name: value for name, value in backbone.state_dict().items() if name != 'pretrained_windows'}
    for allowed in allow_missing:
        if not any(is_in(name, (allowed,)) for name in own):
            raise CheckpointError(f'allow_missing names {allowed!r}, and the backbone has no such parameter or module')
    weights, rearranged, left_out = {}, dict(converted.rearranged), dict(converted.left_out)
    theirs = infer_arguments(converted.weights)
    unbuilt = _unbuilt(backbone, theirs)
    for name, in_file in converted.names.items():
        if is_in(name, unbuilt):
            left_out.setdefault(in_file, UNBUILT)
    for name, value in converted.weights.items():
        if is_in(name, unbuilt):
            continue
        norm = re.match(r'norm(\d)\.(weight|bias)$', name)
        if norm and int(norm[1]) < len(backbone.window_size) and name not in own:
            left_out[converted.names.get(name, name)] = 'norm of a stage that the backbone does not return'
            continue
        if name.endswith(BIAS_TABLE) and name in own and value.shape != own[name].shape:
            value = _resized(value, _table_window(own[name]))
            rearranged[name] = 'table resized bicubically'
        if name == PATCH_FILTERS and name in own and is_in(name, allow_missing):
            value, how = _with_channels(value, own[name])
            if how:
                rearranged[name] = how
        if name in own and value.shape != own[name].shape and is_in(name, allow_missing):
            left_out[converted.names.get(name, name)] = 'of another shape, which allow_missing allows'
            continue
        weights[name] = value
    initial = _find_initial(own, weights, allow_missing)
    shapes = {name: tuple(value.shape) for name, value in own.items() if name not in initial}
    _check_names(shapes, weights, theirs, dict(infer_arguments(own) or {}, arch=arch_argument(backbone.arch)))
    for name, value in weights.items():
        _check_values(name, value, own[name].dtype)
    return weights, {name: rearranged[name] for name in weights if name in rearranged}, left_out, initial


def _unbuilt(backbone, theirs):
    """The modules that a file of these arguments has and a backbone of as many stages does not build."""
    num_stages, built = len(backbone.arch.depths), len(backbone.layers)
    if not theirs or len(parse_arch(theirs['arch']).depths) != num_stages or built == num_stages:
        return []
    later = range(built, num_stages)
    return [f'layers.{built - 1}.downsample', *(f'layers.{i}' for i in later), *(f'norm{i}' for i in later)]


def _find_initial(own, weights, allow_missing):
    """Names that may stay at their initial value: of output norms that the file lacks whole, and those allowed."""
    initial = {}
    for name in own:
        if name in weights:
            continue
        norm = name.split('.')[0]
        if norm.startswith('norm') and not any(other.startswith(f'{norm}.') for other in weights):
            initial[name] = 'output norm that the file does not have'
        elif is_in(name, allow_missing):
            initial[name] = 'allowed by allow_missing'
    return initial


def is_in(name: str, allowed: Sequence[str]) -> bool:
    """Whether a parameter is one of, or in a module that is one of, the names."""
    return any(name == other or name.startswith(f'{other}.') for other in allowed)


def _check_names(shapes, weights, theirs, ours):
    """Check that weights are those of the shapes by name, all and no other.

    ``theirs`` are the arguments that the file shows, None where it shows none, and ``ours`` those of the backbone.
    """
    lacking = [name for name in shapes if name not in weights]
    unknown = [name for name in weights if name not in shapes]
    misshapen = [name for name in shapes if name in weights and shapes[name] != weights[name].shape]
    if not lacking and not unknown and not misshapen:
        return
    differences = [key for key in ours if theirs and theirs[key] != ours[key]]
    if differences:
        sides = [', '.join(f'{key}={arguments[key]!r}' for key in differences) for arguments in (theirs, ours)]
        or_else = " or allow_missing=['patch_embed.proj']" if set(differences) <= {'in_channels', 'patch_size'} else ''
        raise CheckpointError(f'it has {sides[0]} and the backbone {sides[1]}: pass {sides[0]}{or_else}')
    wrong = []
    if lacking:
        wrong.append(f'it lacks {some(lacking)}')
    if unknown:
        wrong.append(f'it has {some(unknown)}, which the backbone does not know')
    if misshapen:
        name = misshapen[0]
        wrong.append(f'it has {some(misshapen)} of shape {tuple(weights[name].shape)}, not {shapes[name]}')
    cure = 'it is damaged, or no Swin V2 of the published kind'
    if len(wrong) == 1 and unknown:
        cure = 'it is damaged, or holds more than a backbone, which should then be left out'
    raise CheckpointError(f'{"; ".join(wrong)}: {cure}')


def _check_values(name, value, dtype):
    """Check that a weight is finite in the dtype that it is loaded to."""
    if not all_finite(value.to(dtype)):
        raise CheckpointError(f'{name} holds NaN or infinity: the training that wrote it diverged, take another one')


def all_finite(values: Tensor) -> bool:
    """Whether a tensor of any dtype holds neither NaN nor infinity."""
    is_small = values.is_floating_point() and values.element_size() < 4
    return bool((values.float() if is_small else values).isfinite().all())  # which knows no float8


def some(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    return names[0] if len(names) == 1 else f'{names[0]} and {len(names) - 1} more'


def _label(source):
    return 'state dict' if isinstance(source, Mapping) else os.fspath(source)


@contextmanager
def naming(source):
    """Put the name of a checkpoint before a `CheckpointError` about what it holds."""
    try:
        yield
    except ValueError as error:  # a CheckpointError, or of a number in a name that no int holds
        raise CheckpointError(f'checkpoint {_label(source)}: {printable(" ".join(str(error).splitlines()))}') from None
