"""The published formats of Swin V2 weights: told apart by their names, converted to ours, and back.

Each file here describes one library; `Format` says what there is to describe, and `FORMATS` lists them. No function
changes the dict of tensors that it is given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ...arch import parse_arch
from ...position_bias import ContinuousPositionBias
from ..arguments import infer_arguments
from ..files import CheckpointError
from . import mmpretrain, official, timm, torchvision, transformers
from .base import ConfigFile, Format

LIBRARIES = official, timm, transformers, torchvision, mmpretrain
FORMATS = tuple(format_ for library in LIBRARIES for format_ in library.FORMATS)  # the first that fits is taken
EXPORTS = {format_.name: format_ for format_ in FORMATS if format_.export}
ANCHORS = tuple(format_.anchor for format_ in FORMATS)

# Averaged weights first; mmengine's EMA hook saves them as state_dict, and the plain ones as ema_state_dict.
AVERAGED = 'state_dict_ema', 'model_ema', 'ema_model', 'params_ema', 'ema'
OF_TRAINING_LOOPS = 'model_state_dict', 'model_state', 'net', 'network', 'backbone', 'encoder', 'weights', 'params'
WRAPPERS = (*AVERAGED, 'state_dict', 'ema_state_dict', 'model', 'module', *OF_TRAINING_LOOPS)
MAX_NESTING = 4  # of dicts, deeper than training code nests them; a dict in a file may contain itself
MAX_BACKBONES = 50  # in a file: each takes a pass over all names

COMPUTED = 'computed anew'
SIMMIM = 'for SimMIM pre-training'
OUTSIDE = 'outside the backbone'
LEFT_OUT = (  # our names that are not of the backbone
    (re.compile(r'(relative_coords_table|relative_position_index|attn_mask)$'), COMPUTED),
    (re.compile(r'^mask_token$'), SIMMIM),
    (re.compile(r'^(head|classifier)\.'), 'classifier'),
)


class Converted(NamedTuple):
    """Weights of a backbone by our names, and what became of the other tensors."""

    format: str  # the name of one of FORMATS
    weights: dict[str, Tensor]
    tables: dict[str, Tensor]  # relative_coords_table of the blocks, by our names
    rearranged: dict[str, str]  # our name of each weight that was rearranged: how
    left_out: dict[str, str]  # name in the file: why
    names: dict[str, str]  # our name: name in the file
    place: str  # where in the checkpoint they were: keys of dicts, and the prefix of all names


def unwrap(checkpoint: Mapping, prefix: str = '') -> tuple[dict[str, Tensor], list[str], str]:
    """Take the tensors of a checkpoint out of the dicts that training code wraps them in, averaged weights first.

    Args:
        checkpoint (Mapping): what a file holds.
        prefix (str): chooses one of several backbones, by keys of the dicts and the start of names: ``teacher``.

    Returns:
        tuple: the tensors by name, the keys of the dicts around them, outermost first, and what is left of the prefix.

    Raises:
        CheckpointError: there are no tensors, or several dicts hold backbones and the prefix chooses none.
    """
    wrappers, prefix = [], prefix.replace('/', '.').strip('.')
    for _ in range(MAX_NESTING):
        key = _choose_wrapper(checkpoint, prefix)
        if key is None:
            break
        if _starts_with(prefix, key):
            prefix = prefix[len(key) + 1 :]
        checkpoint = checkpoint[key]
        wrappers.append(key)
    tensors = {
        name: Tensor.detach(value)  # without the attributes that a file may give it
        for name, value in checkpoint.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        keys = ', '.join(str(name) for name in list(checkpoint)[:5]) or 'nothing'
        raise CheckpointError(f'it holds no tensors by name, but {keys}: save or pass the state dict alone')
    return tensors, wrappers, prefix


def _choose_wrapper(checkpoint, prefix):
    """The key of the dict to look into, or None if the tensors are here."""
    inner = {key: value for key, value in checkpoint.items() if isinstance(key, str) and _may_hold_tensors(value)}
    named = [key for key in inner if _starts_with(prefix, key)]
    with_backbone = [key for key, value in inner.items() if _holds_backbone(value)]
    known = [key for key in WRAPPERS if key in (with_backbone or inner)]
    if not named and not known and len(with_backbone) > 1:
        raise CheckpointError(_several(with_backbone))
    return next(iter([*named, *known, *with_backbone]), None)


def _starts_with(prefix, key):
    return f'{prefix}.'.startswith(f'{key}.')


def _may_hold_tensors(value):
    return isinstance(value, Mapping) and any(isinstance(held, (Tensor, Mapping)) for held in value.values())


def _holds_backbone(value):
    """Whether a dict, or one inside it, has the filters of a patch embedding by the name of some format."""
    level, seen = [value], set()
    for _ in range(MAX_NESTING):
        inner = [held for mapping in level for held in mapping.items()]
        if any(isinstance(held, Tensor) and isinstance(name, str) and name.endswith(ANCHORS) for name, held in inner):
            return True
        level = {id(held): held for _, held in inner if isinstance(held, Mapping) and id(held) not in seen}
        seen.update(level)
        level = list(level.values())
    return False


def _several(prefixes):
    listed = ', '.join(repr(prefix) for prefix in sorted(prefixes))
    return f'it holds several backbones, with the prefixes {listed}: choose one, as prefix={sorted(prefixes)[0]!r}'


def identify(tensors: Mapping[str, Tensor], prefix: str = '') -> tuple[Format, str]:
    """Find the backbone among tensors.

    Args:
        tensors (Mapping): tensors by name.
        prefix (str): where to look, with or without the dot at its end.

    Returns:
        tuple: the format, and the prefix that all names of the backbone have.

    Raises:
        CheckpointError: there is no Swin V2, or more than one, or a Swin V1.
    """
    found = {}
    for format_ in FORMATS:
        anchors = [name for name in tensors if name.endswith(format_.anchor)]
        if len(anchors) > MAX_BACKBONES:
            raise CheckpointError(f'it holds {len(anchors)} models: save the weights of one alone')
        for name in anchors:
            start = name[: -len(format_.anchor)]
            if (not start or start.endswith('.')) and start not in found and _fits(format_, tensors, start):
                found[start] = format_
    chosen = [start for start in found if not prefix or start.startswith(f'{prefix.rstrip(".")}.')]
    if len(chosen) > 1:
        raise CheckpointError(_several(chosen))
    if found and not chosen:
        raise CheckpointError(f'it holds no Swin V2 with the prefix {prefix!r}, but with {", ".join(map(repr, found))}')
    if not found:
        raise CheckpointError(_why_none(tensors))
    return found[chosen[0]], chosen[0]


def _fits(format_, tensors, prefix):
    names = [name[len(prefix) :] for name in tensors if name.startswith(prefix)]
    is_marked = any(re.match(format_.mark, name) for name in names)
    return is_marked and any('logit_scale' in format_.to_our_name(name) for name in names)  # else it is a Swin V1


def _why_none(tensors):
    shown = f'its tensors are {", ".join(list(tensors)[:3])}{" and so on" if len(tensors) > 3 else ""}'
    has_cpb = any(re.search(r'(cpb|rpe|continuous_position_bias)_mlp', name) for name in tensors)
    if has_cpb and any('logit_scale' in name for name in tensors):
        known = ', '.join(format_.name for format_ in FORMATS)
        return f'it holds weights of a Swin V2, but in none of the known formats ({known}): {shown}'
    if any(re.search(r'(layers|stages)\.\d+\.blocks\..*relative_position_bias_table$', name) for name in tensors):
        return "it is a Swin V1, another model: use type='SwinTransformer' of the host, or a Swin V2 checkpoint"
    return f'it is not a Swin V2: {shown}'


def convert(checkpoint: Mapping, prefix: str = '') -> Converted:
    """Convert weights of any published format to ours.

    Tensors are renamed, and rearranged if the library arranges them in another way (see `Format`). The norm before a
    classifier becomes that of the last stage.

    Args:
        checkpoint (Mapping): what a file holds.
        prefix (str): chooses one of several backbones; see `unwrap`.

    Raises:
        CheckpointError: see `unwrap` and `identify`; or weights do not have the shapes that the format needs.
    """
    tensors, wrappers, prefix = unwrap(checkpoint, prefix)
    format_, prefix = identify(tensors, prefix)
    our_names = _our_names(tensors, format_, prefix)
    renamed, left_out = _rename(tensors, our_names)
    weights, rearranged = _rearrange(renamed, format_)
    return Converted(
        format=format_.name,
        weights=weights,
        tables={ours: tensors[name] for name, ours in our_names.items() if ours.endswith('relative_coords_table')},
        rearranged=rearranged,
        left_out=left_out,
        names={ours: name for name, ours in our_names.items()},
        place='/'.join([*wrappers, *([prefix] if prefix else [])]),
    )


def _our_names(names, format_, prefix):
    """Our names of the tensors with the prefix, by their names in the file."""
    ours = {name: format_.to_our_name(name[len(prefix) :]) for name in names if name.startswith(prefix)}
    stages = [int(match[1]) for our_name in ours.values() if (match := re.match(r'layers\.(\d+)\.', our_name))]
    last_norm = f'norm{max(stages, default=0)}.'
    return {name: re.sub(r'^norm\.', last_norm, our_name) for name, our_name in ours.items()}


def _rename(tensors, our_names):
    """The tensors of the backbone by our names, and why the others are left out, by their names in the file."""
    is_simmim = 'mask_token' in our_names.values()
    renamed, left_out = {}, {}
    for name, value in tensors.items():
        ours = our_names.get(name, name)
        why = None if name in our_names else OUTSIDE
        if is_simmim and ours.startswith('decoder.'):
            why = SIMMIM
        why = why or next((why for pattern, why in LEFT_OUT if pattern.search(ours)), None)
        if why is not None:
            left_out[name] = why
        elif ours in renamed:
            raise CheckpointError(f'{name} and another tensor are both {ours}: the file is damaged')
        else:
            _check_kind(name, value, floating=ours != 'pretrained_windows')
            renamed[ours] = value
    return renamed, left_out


def _rearrange(tensors, format_):
    """The weights of the backbone, and how those were made that are not one tensor of the file."""
    weights, rearranged = {}, {}
    for name, value in tensors.items():
        made = format_.rearrange(name, tensors)
        for ours, weight in ({name: value} if made is None else made).items():
            if ours in weights:
                raise CheckpointError(f'two tensors of it are {ours}: the file is damaged')
            weights[ours] = weight
            if made is not None:
                rearranged[ours] = format_.rearranged
    return weights, rearranged


def _check_kind(name, value, floating=True):
    """Check that a tensor is dense and has values, by default floating-point ones."""
    if value.layout != torch.strided or value.is_meta or (floating and not value.is_floating_point()):
        raise CheckpointError(
            f'{name} is {value.dtype} ({value.layout}), not floating-point numbers: it is damaged, or not of the '
            'backbone, and should then be left out'
        )


def export(weights: Mapping[str, Tensor], pretrained_windows: tuple[int, ...], to: str) -> dict[str, Tensor]:
    """Convert weights to the format of another library. Of the output norms it keeps only the last.

    Args:
        weights (Mapping): by our names, complete.
        pretrained_windows (tuple[int]): in tokens, one per stage. Weights show them in ``official`` alone; for the
            others see `export_config`.
        to (str): one of `EXPORTS`. A library that loads no file without the norm of the last stage gets it at its
            initial value if there is none.

    Raises:
        CheckpointError: the library cannot compute this backbone.
    """
    arguments = infer_arguments(weights)
    if arguments['position_bias'] != ContinuousPositionBias.kind:
        raise CheckpointError(f'{to} has no position bias of the kind {arguments["position_bias"]}')
    if any(re.search(r'blocks\.\d+\.norm3\.', name) for name in weights):
        raise CheckpointError(f'{to} has no extra norms after blocks, as of huge and giant')
    last = len(pretrained_windows) - 1
    renamed = {re.sub(rf'^norm{last}\.', 'norm.', name): value for name, value in weights.items()}
    kept = {
        name: value for name, value in renamed.items() if name != 'pretrained_windows' and not re.match(r'norm\d', name)
    }
    if EXPORTS[to].needs_last_norm and 'norm.weight' not in kept:
        channels = parse_arch(arguments['arch']).embed_dims * 2**last
        kept.update({'norm.weight': torch.ones(channels), 'norm.bias': torch.zeros(channels)})
    return EXPORTS[to].export(kept, pretrained_windows)


def export_config(weights: Mapping[str, Tensor], pretrained_windows: tuple[int, ...], to: str) -> dict | None:
    """The ``config.json`` that a library needs beside the weights; None if it needs none.

    Args:
        weights, pretrained_windows, to: as in `export`.
    """
    config = EXPORTS[to].config
    return config.write(infer_arguments(weights), pretrained_windows) if config else None


__all__ = [
    'COMPUTED',
    'EXPORTS',
    'FORMATS',
    'ConfigFile',
    'Converted',
    'Format',
    'convert',
    'export',
    'export_config',
    'identify',
    'unwrap',
]
