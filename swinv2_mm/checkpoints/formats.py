"""The published layouts of Swin V2 weights: told apart by their names, and converted to ours and back.

Ours is that of the official repository: ``patch_embed``, ``layers.I.blocks.J``, ``layers.I.downsample``. All functions
map a state dict to another and leave the one they are given as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..arch import infer_arguments, parse_arch
from ..position_bias import log_spaced_coordinates
from .files import CheckpointError

# Averaged weights first; mmengine's EMA hook saves them as state_dict, and the plain ones as ema_state_dict.
AVERAGED = 'state_dict_ema', 'model_ema', 'ema_model', 'params_ema', 'ema'
OF_TRAINING_LOOPS = 'model_state_dict', 'model_state', 'net', 'network', 'backbone', 'encoder', 'weights', 'params'
WRAPPERS = (*AVERAGED, 'state_dict', 'ema_state_dict', 'model', 'module', *OF_TRAINING_LOOPS)
MAX_BACKBONES = 50  # in a file: each is looked for among all names
SIMMIM = 'for SimMIM pre-training'
COMPUTED = 'computed anew'
LEFT_OUT = (  # names in our layout that are not of the backbone
    (re.compile(r'(relative_coords_table|relative_position_index|attn_mask)$'), COMPUTED),
    (re.compile(r'^mask_token$'), SIMMIM),
    (re.compile(r'^(head|classifier)\.'), 'classifier'),
)
OUTSIDE = 'outside the backbone'


class Format(NamedTuple):
    """A published layout."""

    name: str
    anchor: str  # the weight of the patch embedding; what stands before it is the prefix of all names
    mark: str  # a pattern that a name after the prefix matches in this layout
    parts: Mapping[str, str] = MappingProxyType({})  # parts of dotted names, theirs to ours
    downsample_first: bool = False  # patch merging belongs to the stage that follows it
    unfolded: bool = False  # patch merging takes its neighbours from nn.Unfold
    joint_bias: bool = False  # one bias of queries, keys and values, whose key part the forward pass zeroes


TRANSFORMERS = {
    'embeddings.patch_embeddings.projection': 'patch_embed.proj',
    'embeddings.norm': 'patch_embed.norm',
    'embeddings.mask_token': 'mask_token',
    'encoder.layers': 'layers',
    'attention.self': 'attn',
    'attention.self.query.weight': 'attn.q.weight',
    'attention.self.key.weight': 'attn.k.weight',
    'attention.self.value.weight': 'attn.v.weight',
    'attention.self.query.bias': 'attn.q_bias',
    'attention.self.value.bias': 'attn.v_bias',
    'attention.self.continuous_position_bias_mlp': 'attn.cpb_mlp',
    'attention.output.dense': 'attn.proj',
    'layernorm_before': 'norm1',
    'layernorm_after': 'norm2',
    'intermediate.dense': 'mlp.fc1',
    'output.dense': 'mlp.fc2',
    'downsample.norm': 'downsample.norm',
    'layernorm': 'norm',
}
TORCHVISION = {
    'features.0.0': 'patch_embed.proj',
    'features.0.2': 'patch_embed.norm',
    **{f'features.{2 * i + 1}': f'layers.{i}.blocks' for i in range(4)},
    **{f'features.{2 * i + 2}': f'layers.{i}.downsample' for i in range(3)},
    'mlp.0': 'mlp.fc1',
    'mlp.3': 'mlp.fc2',
}
MMPRETRAIN = {
    'patch_embed.projection': 'patch_embed.proj',
    'stages': 'layers',
    'attn.w_msa': 'attn',
    'ffn.layers.0.0': 'mlp.fc1',
    'ffn.layers.1': 'mlp.fc2',
}
OFFICIAL = {'rpe_mlp': 'cpb_mlp'}  # in the files of SimMIM, and those that were fine-tuned from them
TIMM_FEATURES = {f'layers_{i}': f'layers.{i}' for i in range(4)}
FORMATS = (  # the first that fits
    Format('swinv2_mm', 'patch_embed.proj.weight', r'pretrained_windows$'),
    Format('SimMIM', 'patch_embed.proj.weight', r'mask_token$', OFFICIAL),
    Format('official', 'patch_embed.proj.weight', r'layers\.0\.downsample\.', OFFICIAL),
    Format('timm', 'patch_embed.proj.weight', r'layers\.\d+\.downsample\.', downsample_first=True),
    Format('timm features_only', 'patch_embed.proj.weight', r'layers_\d+\.', TIMM_FEATURES, downsample_first=True),
    Format('transformers', 'embeddings.patch_embeddings.projection.weight', r'encoder\.layers\.', TRANSFORMERS),
    Format('torchvision', 'features.0.0.weight', r'features\.1\.', TORCHVISION, joint_bias=True),
    Format(
        'mmpretrain', 'patch_embed.projection.weight', r'stages\.', MMPRETRAIN, downsample_first=True, unfolded=True
    ),
)


class Converted(NamedTuple):
    """Weights of a backbone in our layout, and what became of the others."""

    format: str
    weights: dict[str, Tensor]
    tables: dict[str, Tensor]  # relative_coords_table of the blocks
    rearranged: dict[str, str]  # our name of each weight that is not just one of the file: what was done
    left_out: dict[str, str]  # name in the file: why
    names: dict[str, str]  # our name: name in the file
    place: str  # where in the checkpoint they were: keys of dicts, and the prefix of all names


def unwrap(checkpoint: Mapping, prefix: str = '') -> tuple[dict[str, Tensor], list[str], str]:
    """The tensors of a checkpoint, out of the dicts that training code wraps them in; averaged weights before plain.

    Args:
        checkpoint (Mapping): what a file holds.
        prefix (str): chooses one of several backbones, by keys of the dicts and the start of names: ``teacher``.

    Returns:
        tuple: the tensors by name, the keys of the dicts around them, from the outside, and what is left of the prefix.

    Raises:
        CheckpointError: there are none.
    """
    wrappers, prefix = [], prefix.replace('/', '.').strip('.')
    for _ in range(4):  # deeper than anybody nests them; a file could nest them in a circle
        inner = {key: value for key, value in checkpoint.items() if isinstance(key, str) and _may_hold_tensors(value)}
        named = [key for key in inner if f'{prefix}.'.startswith(f'{key}.')]
        with_backbone = [key for key, value in inner.items() if _holds_backbone(value)]
        known = [key for key in WRAPPERS if key in (with_backbone or inner)]
        if not named and not known and len(with_backbone) > 1:
            raise CheckpointError(_several(with_backbone))
        wrapper = next(iter([*named, *known, *with_backbone]), None)
        if wrapper is None:
            break
        if wrapper in named:
            prefix = prefix[len(wrapper) + 1 :]
        checkpoint = checkpoint[wrapper]
        wrappers.append(wrapper)
    tensors = {
        name: Tensor.detach(value)  # without its attributes, which torch.load takes from a file
        for name, value in checkpoint.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        keys = ', '.join(str(name) for name in list(checkpoint)[:5]) or 'nothing'
        raise CheckpointError(f'it holds no tensors by name, but {keys}: save or pass the state dict alone')
    return tensors, wrappers, prefix


def _may_hold_tensors(value):
    return isinstance(value, Mapping) and any(isinstance(held, (Tensor, Mapping)) for held in value.values())


def _holds_backbone(value):
    anchors, level, seen = tuple(layout.anchor for layout in FORMATS), [value], set()
    for _ in range(4):
        inner = [held for mapping in level for held in mapping.items()]
        if any(isinstance(held, Tensor) and isinstance(name, str) and name.endswith(anchors) for name, held in inner):
            return True
        level = {id(held): held for _, held in inner if isinstance(held, Mapping) and id(held) not in seen}
        seen.update(level)
        level = list(level.values())
    return False


def _several(prefixes):
    listed = ', '.join(repr(prefix) for prefix in sorted(prefixes))
    return f'it holds several backbones, with the prefixes {listed}: choose one, as prefix={sorted(prefixes)[0]!r}'


def identify(state_dict: Mapping[str, Tensor], prefix: str = '') -> tuple[Format, str]:
    """The layout of a state dict, and the prefix that all names of the backbone have in it.

    Args:
        state_dict (Mapping): tensors by name.
        prefix (str): where to look, with or without the dot at its end.

    Raises:
        CheckpointError: it holds no Swin V2, or more than one, or a Swin V1.
    """
    found = {}
    for layout in FORMATS:
        anchors = [name for name in state_dict if name.endswith(layout.anchor)]
        if len(anchors) > MAX_BACKBONES:
            raise CheckpointError(f'it holds {len(anchors)} models: save the weights of one alone')
        for name in anchors:
            start = name[: -len(layout.anchor)]
            if (not start or start.endswith('.')) and start not in found:
                names = [other[len(start) :] for other in state_dict if other.startswith(start)]
                is_v2 = any('logit_scale' in other for other in names)
                if is_v2 and any(re.match(layout.mark, other) for other in names):
                    found[start] = layout
    chosen = [start for start in found if not prefix or start.startswith(f'{prefix.rstrip(".")}.')]
    if len(chosen) > 1:
        raise CheckpointError(_several(chosen))
    if found and not chosen:
        raise CheckpointError(f'it holds no Swin V2 with the prefix {prefix!r}, but with {", ".join(map(repr, found))}')
    if not found:
        raise CheckpointError(_why_none(state_dict))
    return found[chosen[0]], chosen[0]


def _why_none(state_dict):
    has_cpb = any(re.search(r'(cpb|rpe|continuous_position_bias)_mlp', name) for name in state_dict)
    if has_cpb and any('logit_scale' in name for name in state_dict):
        return (
            'it holds weights of a Swin V2 but no layout known for one (of the official repository, timm, '
            f'transformers, torchvision, mmpretrain or ours): {_examples(state_dict)}'
        )
    if any(re.search(r'(layers|stages)\.\d+\.blocks\..*relative_position_bias_table$', name) for name in state_dict):
        return "it is a Swin V1, another model: use type='SwinTransformer' of the host, or a Swin V2 checkpoint"
    return f'it is no Swin V2: {_examples(state_dict)}'


def _examples(state_dict):
    return f'its tensors are {", ".join(list(state_dict)[:3])}{" and so on" if len(state_dict) > 3 else ""}'


def convert(checkpoint: Mapping, prefix: str = '') -> Converted:
    """Weights of any published layout, as they were read, in ours.

    Separate queries, keys and values are joined; the key bias of torchvision, which its forward pass replaces by 0, is
    left out; the neighbours of a patch merging that uses nn.Unfold (mmpretrain) are reordered; patch mergings that
    begin a stage (timm, mmpretrain) end the one before it; the norm before a classifier is that of the last stage.

    Args:
        checkpoint (Mapping): what a file holds.
        prefix (str): chooses one of several backbones; see `unwrap`.

    Raises:
        CheckpointError: see `unwrap` and `identify`; or weights do not have the shapes that the layout needs.
    """
    state_dict, wrappers, prefix = unwrap(checkpoint, prefix)
    layout, prefix = identify(state_dict, prefix)
    our_names = _our_names(state_dict, layout, prefix)
    is_simmim = 'mask_token' in our_names.values()
    parts, tables, left_out = {}, {}, {}
    for name, value in state_dict.items():
        inside = name in our_names
        ours = our_names.get(name, name)
        if is_simmim and ours.startswith('decoder.'):
            why = SIMMIM
        else:
            why = next((why for pattern, why in LEFT_OUT if pattern.search(ours)), None) if inside else OUTSIDE
        if inside and ours.endswith('relative_coords_table'):
            tables[ours] = value
        if why is not None:
            left_out[name] = why
        elif ours in parts:
            raise CheckpointError(f'{name} and another tensor are both {ours}: the file is damaged')
        else:
            _check_kind(name, value, floating=ours != 'pretrained_windows')
            parts[ours] = value
    weights, rearranged = _assemble(parts, layout)
    names = {ours: name for name, ours in our_names.items()}
    place = '/'.join([*wrappers, *([prefix] if prefix else [])])
    return Converted(layout.name, weights, tables, rearranged, left_out, names, place)


def _our_names(names, layout, prefix):
    """By name in the file that in our layout, of the tensors of the backbone."""
    rename = _renamer(layout.parts)
    ours = {name: rename(name[len(prefix) :]) for name in names if name.startswith(prefix)}
    if layout.downsample_first:
        ours = {name: _shift_downsample(our_name, -1) for name, our_name in ours.items()}
    stages = [int(match[1]) for our_name in ours.values() if (match := re.match(r'layers\.(\d+)\.', our_name))]
    last_norm = f'norm{max(stages, default=0)}.'
    return {name: re.sub(r'^norm\.', last_norm, our_name) for name, our_name in ours.items()}


def _assemble(parts, layout):
    """The weights that a backbone has, and of each that is not just one of the file what was done."""
    weights, rearranged = {}, {}

    def put(ours, value, how=None):
        if ours in weights:
            raise CheckpointError(f'two tensors of it are {ours}: the file is damaged')
        weights[ours] = value
        if how:
            rearranged[ours] = how

    for name, value in parts.items():
        stem, found, leaf = name.rpartition('attn.')
        attn = stem + found
        if leaf == 'q.weight':
            parts_of_qkv = [parts.get(f'{attn}{part}.weight') for part in 'qkv']
            put(f'{attn}qkv.weight', _joined(name, parts_of_qkv), 'q, k, v joined')
        elif leaf in ('k.weight', 'v.weight') and f'{attn}q.weight' in parts:
            continue
        elif leaf == 'qkv.bias' and layout.joint_bias:
            for part, bias in zip('qv', _without_key_bias(name, value)):
                put(f'{attn}{part}_bias', bias, 'key bias dropped, which the forward pass zeroes')
        elif layout.unfolded and name.endswith('downsample.reduction.weight'):
            put(name, _from_unfolded(name, value), 'neighbours reordered')
        else:
            put(name, value)
    return weights, rearranged


def _check_kind(name, value, floating=True):
    """Check that a tensor is dense and has values, by default floating-point ones."""
    if value.layout != torch.strided or value.is_meta or (floating and not value.is_floating_point()):
        raise CheckpointError(
            f'{name} is {value.dtype} ({value.layout}), not floating-point numbers: it is damaged, or not of the '
            'backbone, and should then be left out'
        )


def _joined(name, parts):
    """(3C, C) of three (C, C)."""
    kinds = {None if part is None else (part.shape, part.dtype) for part in parts}
    if len(kinds) > 1 or parts[0].ndim != 2:
        raise CheckpointError(f'{name} and those of k and v are not three of one shape and dtype: the file is damaged')
    return torch.cat(parts)


def _without_key_bias(name, bias):
    """(C,) of queries and of values, of (3C,): the forward pass of torchvision replaces the key's by 0."""
    if bias.ndim != 1 or len(bias) % 3:
        raise CheckpointError(f'{name} must be (3C,), got {tuple(bias.shape)}: the file is damaged')
    return bias.chunk(3)[::2]


def _from_unfolded(name, weight):
    """(2C, 4C), from channels of four neighbours each, row by row, to neighbours of C channels, column by column."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        raise CheckpointError(f'{name} must be (2C, 4C), got {tuple(weight.shape)}: the file is damaged')
    return weight.unflatten(1, (-1, 2, 2)).permute(0, 3, 2, 1).flatten(1)  # (2C, C, row, column) to (2C, 4C)


def export(weights: Mapping[str, Tensor], pretrained_windows: tuple[int, ...], to: str) -> dict[str, Tensor]:
    """Weights in our layout in that of another implementation, for which the output norms but the last are left out.

    Args:
        weights (Mapping): in our layout, complete.
        pretrained_windows (tuple[int]): per stage. For ``official`` they go into the tables of coordinates; for the
            others see `export_config`.
        to (str): official, timm or transformers. timm gets a norm of the last stage at its initial value if there is
            none.

    Raises:
        CheckpointError: the other implementation cannot compute this backbone.
    """
    arguments = infer_arguments(weights)
    if arguments['position_bias'] != 'log_cpb':
        raise CheckpointError(f'{to} has no position bias of the kind {arguments["position_bias"]}')
    if any(re.search(r'blocks\.\d+\.norm3\.', name) for name in weights):
        raise CheckpointError(f'{to} has no extra norms after blocks, as of huge and giant')
    last = len(pretrained_windows) - 1
    theirs = {}
    for name, value in weights.items():
        name = re.sub(rf'^norm{last}\.', 'norm.', name)
        if name != 'pretrained_windows' and not re.match(r'norm\d', name):
            theirs[name] = value
    if to == 'official':
        for name in weights:
            if name.endswith('logit_scale'):
                window = pretrained_windows[int(name.split('.')[1])]
                table = log_spaced_coordinates(window, window, window, dtype=torch.float32)[None]
                theirs[name.replace('logit_scale', 'relative_coords_table')] = table
        return theirs
    if to == 'timm':
        if 'norm.weight' not in theirs:  # timm loads no file without, not even for its features
            channels = parse_arch(arguments['arch']).embed_dims * 2**last
            theirs.update({'norm.weight': torch.ones(channels), 'norm.bias': torch.zeros(channels)})
        return {_shift_downsample(name, 1): value for name, value in theirs.items()}
    rename = _renamer({ours: part for part, ours in TRANSFORMERS.items()})
    split = {}
    for name, value in theirs.items():
        if name.endswith('attn.qkv.weight'):
            stem = name[: -len('qkv.weight')]
            split.update({rename(f'{stem}{letter}.weight'): part for letter, part in zip('qkv', value.chunk(3))})
        else:
            split[rename(name)] = value
    return split


def export_config(weights: Mapping[str, Tensor], pretrained_windows: tuple[int, ...], to: str) -> dict | None:
    """What timm or transformers wants in a ``config.json`` beside the weights; None for official ones.

    The image size is the one at which the last map is one window; both take another size, and another window, where
    they build the model.
    """
    if to == 'official':
        return None
    arguments = infer_arguments(weights)
    arch = parse_arch(arguments['arch'])
    patch_size = arguments['patch_size']
    image_size = patch_size * 2 ** (len(arch.depths) - 1) * pretrained_windows[-1]
    shared = dict(
        patch_size=patch_size,
        embed_dim=arch.embed_dims,
        depths=list(arch.depths),
        num_heads=list(arch.num_heads),
        window_size=max(pretrained_windows),
        pretrained_window_sizes=list(pretrained_windows),
        mlp_ratio=arguments['mlp_ratio'],
        qkv_bias=arguments['qkv_bias'],
    )
    if to == 'transformers':
        return dict(
            model_type='swinv2',
            architectures=['Swinv2Model'],
            image_size=image_size,
            num_channels=arguments['in_channels'],
            **shared,
        )
    return dict(
        architecture='swinv2_tiny_window8_256',  # any that timm knows: the arguments replace all of it
        num_classes=0,
        pretrained_cfg={},
        model_args=dict(img_size=image_size, in_chans=arguments['in_channels'], **shared),
    )


def _renamer(parts):
    """A function that replaces parts of a dotted name, each once, the longest first."""
    longest_first = sorted(parts, key=len, reverse=True)
    pattern = re.compile(rf'(?<![^.])({"|".join(map(re.escape, longest_first))})(?![^.])')
    return (lambda name: pattern.sub(lambda match: parts[match[1]], name)) if parts else (lambda name: name)


def _shift_downsample(name, by):
    """Move a patch merging to the stage before (-1) or after (1) it."""
    return re.sub(r'^layers\.(\d+)(?=\.downsample\.)', lambda match: f'layers.{int(match[1]) + by}', name)
