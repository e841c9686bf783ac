"""Fitting weights to a backbone: everything that it needs must be there, finite and in the right shape."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..arch import arch_argument, parse_arch
from ..position_bias import POSITION_BIASES
from .arguments import infer_arguments
from .files import CheckpointError
from .formats import Converted
from .report import first_of
from .windows import TrainedWindows

PATCH_FILTERS = 'patch_embed.proj.weight'
OUTPUT_NORM = re.compile(r'norm(\d{1,3})\.(weight|bias)$')
NOT_BUILT = 'of a stage after the last of out_indices, which is not built'
MAX_BLOCKS = 200  # the largest published backbone has 50; a file may name any number, and has to hold more of these
BLOCK_TENSORS = 13  # that a block has at least


class Fitted(NamedTuple):
    """Weights that a backbone can load, and what became of the other tensors."""

    weights: dict[str, Tensor]  # by names in the backbone, with pretrained_windows if it takes those of the checkpoint
    rearranged: dict[str, str]  # names in the backbone whose values were rearranged: how
    left_out: dict[str, str]  # names in the file: why
    initial: dict[str, str]  # names in the backbone that stay at their initial value: why


def fit_weights(
    backbone: nn.Module, converted: Converted, windows: TrainedWindows, allow_missing: Sequence[str] = ()
) -> Fitted:
    """Fit converted weights to a backbone, which may be on the meta device; changes nothing.

    Args:
        backbone (SwinTransformerV2): what they are for.
        converted (Converted): the weights, without ``pretrained_windows``.
        windows (TrainedWindows): what is known about their windows.
        allow_missing (Sequence[str]): as in `load_pretrained`.

    Raises:
        CheckpointError: anything that the backbone needs is missing, misshapen or not finite; the file holds weights
            that the backbone does not have; or nothing says the pretrained windows.
    """
    own = _own_weights(backbone)
    for name in allow_missing:
        if not any(is_within(weight, (name,)) for weight in own):
            raise CheckpointError(f'allow_missing names {name!r}, and the backbone has no such parameter or module')
    theirs = infer_arguments(converted.weights)
    weights, left_out = _drop_unbuilt(converted, own, backbone, theirs)
    rearranged = dict(converted.rearranged)
    for name in [name for name in weights if name in own and weights[name].shape != own[name].shape]:
        weights[name], how = _adapt(name, weights[name], own[name], backbone, allow_missing)
        if how:
            rearranged[name] = how
        if weights[name].shape != own[name].shape and is_within(name, allow_missing):
            left_out[converted.names.get(name, name)] = 'of another shape, which allow_missing allows'
            del weights[name]
    initial = _find_initial(own, weights, allow_missing)
    ours = dict(infer_arguments(own) or {}, arch=arch_argument(backbone.arch))
    _check_shapes({name: value for name, value in own.items() if name not in initial}, weights, theirs, ours)
    for name, value in weights.items():
        _check_finite(name, value, own[name].dtype)
    rearranged = {name: rearranged[name] for name in weights if name in rearranged}
    weights.update(_pretrained_windows(backbone, windows))
    return Fitted(weights, rearranged, left_out, initial)


def check_complete(
    converted: Converted, windows: TrainedWindows, backbone_class: Callable[..., nn.Module]
) -> dict[str, object]:
    """Check, without allocating a backbone, that weights are those of a whole one, in the right shapes.

    Args:
        converted (Converted): the weights, without ``pretrained_windows``.
        windows (TrainedWindows): what is known about their windows.
        backbone_class (type): `SwinTransformerV2`, which this package does not import.

    Returns:
        dict: the arguments of the backbone that takes them, as from `infer_arguments`.

    Raises:
        CheckpointError: a parameter is missing, misshapen, unknown or not finite.
    """
    weights = converted.weights
    arguments = infer_arguments(weights)
    if arguments is None:
        raise CheckpointError(
            'it lacks weights that show its architecture, in its first block or the logit_scale of a stage'
        )
    depths = parse_arch(arguments['arch']).depths
    if windows.pretrained_window_sizes and len(windows.pretrained_window_sizes) != len(depths):
        raise CheckpointError(f'it has {len(depths)} stages and the windows {windows.pretrained_window_sizes}')
    if sum(depths) > MAX_BLOCKS and sum(depths) * BLOCK_TENSORS > len(weights):
        raise CheckpointError(f'it names {sum(depths)} blocks, and {len(weights)} tensors are too few: it is damaged')
    own = _own_weights(_build_on_meta(backbone_class, arguments, windows.window_size))
    initial = _find_initial(own, weights)
    _check_shapes({name: value for name, value in own.items() if name not in initial}, weights, arguments, arguments)
    for name, value in weights.items():
        _check_finite(name, value, value.dtype)
    return arguments


def _build_on_meta(backbone_class, arguments, window_size):
    """Build a backbone on the meta device, with an output norm for every stage."""
    stages = range(len(parse_arch(arguments['arch']).depths))
    in_shapes = window_size and not POSITION_BIASES[arguments['position_bias']].has_pretrained_window
    windows = dict(window_size=window_size) if in_shapes else {}
    try:
        with torch.device('meta'):
            return backbone_class(**arguments, **windows, out_indices=stages)
    except (ArithmeticError, RuntimeError, TypeError, ValueError):  # of sizes that no tensor has
        shown = ', '.join(f'{key}={value!r}' for key, value in arguments.items())
        raise CheckpointError(f'its shapes are those of {shown}, which cannot be built: it is damaged') from None


def _own_weights(backbone):
    return {name: value for name, value in backbone.state_dict().items() if name != 'pretrained_windows'}


def _drop_unbuilt(converted, own, backbone, theirs):
    """The weights of the stages that the backbone builds, and why other tensors are left out, by name in the file."""
    left_out, weights = dict(converted.left_out), {}
    unbuilt = _unbuilt(backbone, theirs)
    for name, in_file in converted.names.items():
        if is_within(name, unbuilt):
            left_out.setdefault(in_file, NOT_BUILT)
    for name, value in converted.weights.items():
        norm = OUTPUT_NORM.match(name)
        if norm and int(norm[1]) < len(backbone.window_size) and name not in own:
            left_out[converted.names.get(name, name)] = 'norm of a stage that the backbone does not return'
        elif not is_within(name, unbuilt):
            weights[name] = value
    return weights, left_out


def _unbuilt(backbone, theirs):
    """The modules of a file with these arguments that a backbone of as many stages does not build."""
    num_stages, built = len(backbone.arch.depths), len(backbone.layers)
    if not theirs or len(parse_arch(theirs['arch']).depths) != num_stages or built == num_stages:
        return []
    later = range(built, num_stages)
    return [f'layers.{built - 1}.downsample', *(f'layers.{i}' for i in later), *(f'norm{i}' for i in later)]


def _adapt(name, value, own, backbone, allow_missing):
    """Bring a weight into the shape of the backbone's own, if possible. Returns it, and what was done or None."""
    bias = POSITION_BIASES[backbone.position_bias]
    if f'.attn.{bias.name}.' in name:
        try:
            resized = bias.resize_weight(value, own)
        except ValueError as error:
            raise CheckpointError(f'{error}: the file is damaged') from None
        return resized, None if resized is value else 'table resized bicubically'
    if name == PATCH_FILTERS and is_within(name, allow_missing):
        return _match_channels(value, own)
    return value, None


def _match_channels(filters, own):
    """Match patch filters, (C, channels, P, P), to the image channels of the backbone, if their other sides fit.

    Returns the filters, and what was done or None. Filters that are summed over RGB give a grey image the features that
    it has as RGB.
    """
    given, wanted = filters.shape[1:2].numel(), own.shape[1]
    if given == wanted or filters.ndim != 4 or filters[:, 0].shape != own[:, 0].shape:
        return filters, None
    if wanted == 1:
        return filters.sum(1, keepdim=True), f'filters of {given} channels summed'
    rest = torch.zeros_like(own, device='cpu') if own.is_meta else own.detach().cpu()
    kept = torch.cat([filters[:, :wanted], rest[:, given:].to(filters.dtype)], 1)
    return kept, f'filters of the first {min(given, wanted)} channels kept, {max(wanted - given, 0)} initial'


def _find_initial(own, weights, allow_missing=()):
    """Names that may stay at their initial value, and why: output norms that the file lacks, and those allowed."""
    initial = {}
    for name in own:
        if name in weights:
            continue
        norm = name.split('.')[0]
        if norm.startswith('norm') and not any(other.startswith(f'{norm}.') for other in weights):
            initial[name] = 'output norm that the file does not have'
        elif is_within(name, allow_missing):
            initial[name] = 'allowed by allow_missing'
    return initial


def _pretrained_windows(backbone, windows):
    """The buffer of pretrained windows to load, if the position bias has any and something says them."""
    if not POSITION_BIASES[backbone.position_bias].has_pretrained_window:
        return {}
    pretrained = backbone.of_built_stages(windows.pretrained_window_sizes or ())
    if pretrained:
        return {'pretrained_windows': torch.tensor(pretrained)}
    if backbone.pretrained_windows_given:
        return {}
    raise CheckpointError(
        'nothing says the windows that each stage was trained with: pass pretrained_window_sizes, for example '
        '(16, 16, 16, 8) for window 16 at 256 pixels'
    )


def is_within(name: str, modules: Iterable[str]) -> bool:
    """Whether a parameter has one of these names, or is in a module that has."""
    return any(name == module or name.startswith(f'{module}.') for module in modules)


def _check_shapes(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], theirs: dict | None, ours: dict):
    """Check that weights match those of a backbone by name and shape, with none missing and none left over.

    Args:
        own: the weights that the backbone needs.
        weights: those of the file.
        theirs: the arguments that the file shows; None if it does not show them.
        ours: the arguments of the backbone.
    """
    lacking = [name for name in own if name not in weights]
    unknown = [name for name in weights if name not in own]
    misshapen = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if not lacking and not unknown and not misshapen:
        return
    differences = [key for key in ours if theirs and theirs[key] != ours[key]]
    if differences:
        sides = [', '.join(f'{key}={arguments[key]!r}' for key in differences) for arguments in (theirs, ours)]
        or_else = " or allow_missing=['patch_embed.proj']" if set(differences) <= {'in_channels', 'patch_size'} else ''
        raise CheckpointError(f'it has {sides[0]} and the backbone {sides[1]}: pass {sides[0]}{or_else}')
    wrong = []
    if lacking:
        wrong.append(f'it lacks {first_of(lacking)}')
    if unknown:
        wrong.append(f'it has {first_of(unknown)}, which the backbone does not know')
    if misshapen:
        name = misshapen[0]
        shapes = [tuple(tensors[name].shape) for tensors in (weights, own)]
        wrong.append(f'it has {first_of(misshapen)} of shape {shapes[0]}, not {shapes[1]}')
    cure = 'it is damaged, or differs from the published Swin V2'
    if len(wrong) == 1 and unknown:
        cure = 'it is damaged, or holds more than a backbone, which should then be left out'
    raise CheckpointError(f'{"; ".join(wrong)}: {cure}')


def _check_finite(name, value, dtype):
    """Check that a weight is finite in the dtype that it is loaded as."""
    if not all_finite(value.to(dtype)):
        raise CheckpointError(f'{name} holds NaN or infinity: the training that wrote it diverged, take another one')


def all_finite(values: Tensor) -> bool:
    """Whether a tensor of any dtype holds neither NaN nor infinity."""
    is_small = values.is_floating_point() and values.element_size() < 4
    return bool((values.float() if is_small else values).isfinite().all())  # isfinite does not know float8
