"""Damaged checkpoints of every format: they load whole and right, or not at all, with a clear line.

What is right is computed here from templates of names, one per format, that share nothing with the package.
"""

from __future__ import annotations

import re
import signal
import sys
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from draws import DRAWS
from hypothesis import event, given, settings
from hypothesis import strategies as st

from swinv2_mm import CheckpointError, SwinTransformerV2, load_pretrained
from swinv2_mm.checkpoints import formats

ARCH = dict(embed_dims=8, depths=(2, 1), num_heads=(1, 2))
WINDOW = 4
PRETRAINED = (6, 3)  # windows that the tables and the buffer of the sources say
GIVEN = (7, 5)  # windows that the argument says


class Format(NamedTuple):
    """Names of a format: a template per module, and the parts of a block that it calls otherwise than we do."""

    patch_embed: str = 'patch_embed.proj'
    patch_norm: str = 'patch_embed.norm'
    block: str = 'layers.{i}.blocks.{j}.'
    merge: str = 'layers.{i}.downsample.'
    norm: str | None = 'norm'  # of the last stage, before a classifier; None: as ours, one per stage
    parts: tuple[tuple[str, str], ...] = ()
    tables: bool = True


HF = 'attention.self.'
FORMATS = {
    'swinv2_mm': Format(norm=None, tables=False),
    'official': Format(),
    'timm': Format(merge='layers.{k}.downsample.', tables=False),
    'timm features_only': Format(block='layers_{i}.blocks.{j}.', merge='layers_{k}.downsample.', tables=False),
    'transformers': Format(
        'embeddings.patch_embeddings.projection',
        'embeddings.norm',
        'encoder.layers.{i}.blocks.{j}.',
        'encoder.layers.{i}.downsample.',
        'layernorm',
        (
            ('attn.q_bias', f'{HF}query.bias'),
            ('attn.v_bias', f'{HF}value.bias'),
            ('attn.logit_scale', f'{HF}logit_scale'),
            ('attn.cpb_mlp', f'{HF}continuous_position_bias_mlp'),
            ('attn.proj', 'attention.output.dense'),
            ('norm1', 'layernorm_before'),
            ('norm2', 'layernorm_after'),
            ('mlp.fc1', 'intermediate.dense'),
            ('mlp.fc2', 'output.dense'),
        ),
        False,
    ),
    'torchvision': Format(
        'features.0.0',
        'features.0.2',
        'features.{odd}.{j}.',
        'features.{even}.',
        parts=(('mlp.fc1', 'mlp.0'), ('mlp.fc2', 'mlp.3')),
    ),
    'mmpretrain': Format(
        'patch_embed.projection',
        block='stages.{i}.blocks.{j}.',
        merge='stages.{k}.downsample.',
        norm=None,
        parts=(('attn', 'attn.w_msa'), ('mlp.fc1', 'ffn.layers.0.0'), ('mlp.fc2', 'ffn.layers.1')),
    ),
}
ALIASES = {'SimMIM': 'official'}  # the format in the report, the format that it is in


def their_name(fmt, ours):
    """Name of a tensor of the backbone in a format, before tensors are split and joined."""
    names = FORMATS[fmt]
    if match := re.fullmatch(r'patch_embed\.(proj|norm)(\.\w+)', ours):
        return (names.patch_embed if match[1] == 'proj' else names.patch_norm) + match[2]
    if ours.startswith('norm'):
        return ours
    stage, block, leaf = re.fullmatch(r'layers\.(\d)\.(?:blocks\.(\d)|downsample)\.(.+)', ours).groups()
    i = int(stage)
    numbers = dict(i=i, j=block, k=i + 1, odd=2 * i + 1, even=2 * i + 2)
    if block is None:
        return names.merge.format(**numbers) + leaf
    for part, theirs in names.parts:
        if leaf == part or leaf.startswith(f'{part}.'):
            leaf = theirs + leaf[len(part) :]
            break
    return names.block.format(**numbers) + leaf


def their_names(fmt, ours):
    """Names of all tensors of a format that make one of the backbone."""
    name = their_name(fmt, ours)
    if fmt == 'transformers' and name.endswith('.attn.qkv.weight'):
        stem = name[: -len('attn.qkv.weight')]
        return [f'{stem}{HF}{part}.weight' for part in ('query', 'key', 'value')]
    if fmt == 'torchvision' and name.endswith(('.attn.q_bias', '.attn.v_bias')):
        return [name[: -len('q_bias')] + 'qkv.bias']
    return [name]


def norm_names(fmt, ours, last=1):
    """Names of an output norm: those that detectors keep, and that of the norm before a classifier, the last one."""
    return [ours, re.sub(f'^norm{last}', FORMATS[fmt].norm or 'norm', ours)] if re.match(r'norm\d', ours) else []


def last_stage(fmt, prefix, theirs):
    """The last stage of which a checkpoint has blocks: 0 of one that is shallower than the backbone."""
    block = re.escape(prefix + FORMATS[fmt].block.format(i=1, odd=3, j='J')).replace('J', r'\d+')
    return int(any(re.match(block, name) for name in theirs))


def unfolded_order(channels):
    """For each input of our patch merging the index of the same one in mmpretrain, whose nn.Unfold puts channels
    first and rows before columns."""
    return [4 * c + 2 * row + column for column in range(2) for row in range(2) for c in range(channels)]


def to_theirs(fmt, state_dict):
    """A state dict of a backbone in a format."""
    theirs = {}
    for ours, value in state_dict.items():
        names = their_names(fmt, ours)
        if fmt == 'torchvision' and ours.endswith('q_bias'):
            unused = torch.rand_like(value)  # of the keys
            theirs[names[0]] = torch.cat((value, unused, state_dict[ours.replace('q_bias', 'v_bias')]))
        elif fmt == 'mmpretrain' and ours.endswith('reduction.weight'):
            theirs[names[0]] = torch.empty_like(value)
            theirs[names[0]][:, unfolded_order(value.shape[1] // 4)] = value
        elif names[0] not in theirs:
            theirs.update(zip(names, value.chunk(len(names)) if len(names) > 1 else [value]))
    return theirs


def to_ours(fmt, ours, values):
    """The tensor of the backbone that tensors of a format make, float32."""
    if not all(value.is_floating_point() for value in values):
        return None
    values = [value.detach().to(torch.float32) for value in values]
    if fmt == 'torchvision' and ours.endswith(('q_bias', 'v_bias')):
        size = len(values[0]) // 3
        return values[0][:size] if ours.endswith('q_bias') else values[0][-size:]
    if fmt == 'mmpretrain' and ours.endswith('reduction.weight'):
        return values[0][:, unfolded_order(values[0].shape[1] // 4)]
    return torch.cat(values) if len(values) > 1 else values[0]


def coordinates(window, pretrained):
    """The table of official checkpoints, (1, 2W-1, 2W-1, 2)."""
    offsets = np.arange(1 - window, window) * 8 / (pretrained - 1)
    logarithms = np.sign(offsets) * np.log2(np.abs(offsets) + 1) / np.log2(8)
    return torch.tensor(np.stack(np.meshgrid(logarithms, logarithms, indexing='ij'), -1)[None], dtype=torch.float32)


@lru_cache(maxsize=None)
def source(**changes):
    """State dict of a backbone with random weights."""
    arch = {**ARCH, **{key: changes.pop(key) for key in tuple(changes) if key in ARCH}}
    if changes.get('position_bias') != 'parameterized':
        changes['pretrained_window_sizes'] = PRETRAINED[:1] * (len(arch['depths']) - 1) + PRETRAINED[1:]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        backbone = SwinTransformerV2(arch, window_size=WINDOW, out_indices=range(len(arch['depths'])), **changes)
        return {
            name: value if name == 'pretrained_windows' else torch.rand_like(value)
            for name, value in backbone.state_dict().items()
        }


OTHERS = (
    dict(depths=(1, 1)),
    dict(depths=(2, 2)),
    dict(depths=(2, 1, 1), num_heads=(1, 2, 4)),
    dict(depths=(2,), num_heads=(1,)),
    dict(embed_dims=16),
    dict(num_heads=(2, 2)),
    dict(num_heads=(1, 4)),
    dict(qkv_bias=False),
    dict(mlp_ratio=2.0),
    dict(in_channels=4),
    dict(patch_size=2),
    dict(position_bias='linear_cpb'),
    dict(position_bias='parameterized'),
)


def checkpoint(fmt, prefix='', **changes):
    """A valid checkpoint of a format, with what training code keeps beside the weights of the backbone."""
    state_dict = dict(source(**changes))
    windows = state_dict.pop('pretrained_windows')
    last = len(windows) - 1
    theirs = to_theirs(fmt, state_dict)
    if norm := FORMATS[fmt].norm:
        theirs = {re.sub(f'^norm{last}', norm, name): value for name, value in theirs.items()}
        theirs = {name: value for name, value in theirs.items() if not re.match(r'norm\d', name)}
    if fmt == 'swinv2_mm':
        theirs['pretrained_windows'] = windows
    if FORMATS[fmt].tables:
        for name in state_dict:
            if name.endswith('logit_scale'):
                stem = their_name(fmt, name)[: -len('logit_scale')]
                table = coordinates(WINDOW, windows[int(name.split('.')[1])].item())
                theirs[f'{stem}relative_coords_table'] = table
                theirs[f'{stem}relative_position_index'] = torch.zeros(WINDOW**2, WINDOW**2, dtype=torch.int64)
    if fmt == 'official':
        theirs['layers.0.blocks.1.attn_mask'] = torch.zeros(4, WINDOW**2, WINDOW**2)
    theirs = {prefix + name: value.clone() for name, value in theirs.items()}
    head = 'classifier' if fmt == 'transformers' else 'head'
    return {**theirs, f'{head}.weight': torch.ones(3, 16), f'{head}.bias': torch.ones(3)}


def right_windows(fmt, prefix, theirs, num_stages):
    """The pretrained windows that a checkpoint says; None if nothing or nothing consistent does."""
    saved = theirs.get(f'{prefix}pretrained_windows')
    if fmt == 'swinv2_mm' and isinstance(saved, torch.Tensor):
        if saved.is_meta or saved.dtype == torch.bool or saved.is_complex() or saved.ndim != 1:
            return None
        saved = saved.double()  # float8 compares with nothing
        return tuple(saved.tolist()) if (saved >= 1).all() and (saved % 1 == 0).all() else None
    found = []
    for i in range(num_stages):
        stem = re.escape(prefix + FORMATS[fmt].block.format(i=i, odd=2 * i + 1, j='J')).replace('J', r'\d+')
        tables = [
            value
            for name, value in theirs.items()
            if isinstance(value, torch.Tensor)
            and re.fullmatch(rf'{stem}(attn|attn\.w_msa|attention\.self)\.relative_coords_table', name)
        ]
        windows = [pretrained for table in tables for pretrained in (*PRETRAINED, 1) if is_table(table, pretrained)]
        found.append(windows[0] if windows and len(windows) == len(tables) and len(set(windows)) == 1 else None)
    return tuple(found) if None not in found else None


def is_table(table, pretrained):
    if table.ndim not in (3, 4) or table.shape[-1] != 2 or table.shape[-2] % 2 == 0 or table.is_sparse or table.is_meta:
        return False
    if table.shape[-2] == 1 or pretrained == 1:  # a window of one token says itself
        return table.numel() == 2 and pretrained == 1
    expected = coordinates((table.shape[-2] + 1) // 2, pretrained)
    table = table.real if table.is_complex() else table
    return table.numel() == expected.numel() and torch.allclose(table.float().view_as(expected), expected, rtol=0.02)


def right_values(fmt, prefix, theirs, own):
    """What every tensor of the backbone must be, of those the checkpoint has, and the names it comes from.

    A name that is half or all ours is understood in every format.
    """
    values, used, last = {}, set(), last_stage(fmt, prefix, theirs)
    for ours in own:
        whole = their_names(fmt, ours)
        official = their_name('timm' if '{k}' in FORMATS[fmt].merge else 'official', ours)
        for names in (whole, [their_name(fmt, ours)], [official], *([name] for name in norm_names(fmt, ours, last))):
            tensors = [theirs.get(prefix + name) for name in names]
            if ours not in values and all(isinstance(tensor, torch.Tensor) for tensor in tensors):
                values[ours] = to_ours(fmt if names == whole or fmt == 'mmpretrain' else None, ours, tensors)
                used |= {prefix + name for name in names}
    return values, used


def check_load(backbone, source, theirs, prefix):
    """Load; True if it loaded and is right, False if it was refused in one line and the backbone is as it was."""
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    windows_before = backbone.pretrained_window_sizes
    try:
        report = load_pretrained(backbone, source)
    except CheckpointError as error:
        assert '\n' not in str(error)
        assert backbone.pretrained_window_sizes == windows_before
        for name, value in backbone.state_dict().items():
            assert torch.equal(value, before[name]), name
        return False
    after = backbone.state_dict()
    fmt = ALIASES.get(report.format, report.format)
    anchor = their_name(fmt, 'patch_embed.proj.weight')
    if prefix + anchor not in theirs:  # renamed
        prefix = next(name for name in theirs if name.endswith(anchor))[: -len(anchor)]
    values, used = right_values(fmt, prefix, theirs, set(after) - {'pretrained_windows'})
    for name, value in after.items():
        if name in report.initial:
            assert report.initial[name] == 'output norm that the file does not have'
            module = name.rpartition('.')[0]
            assert re.fullmatch(r'norm\d', module)
            assert {f'{module}.weight', f'{module}.bias'} <= set(report.initial)
            assert torch.equal(value, before[name]), name
            assert name not in set(values)
        elif name != 'pretrained_windows':
            assert name in set(values), f'{name} was loaded from a name that is not of the format'
            assert values[name] is not None, f'{name} was loaded from numbers that are not floating-point'
            right = values[name]
            if right.shape != value.shape and name.endswith('relative_position_bias_table.weight'):
                side = int(len(right) ** 0.5)
                image = right.T.reshape(1, -1, side, side)
                right = F.interpolate(image, size=(2 * WINDOW - 1,) * 2, mode='bicubic').flatten(2)[0].T
            assert torch.equal(value, right), name
            assert value.isfinite().all()
    num_stages = len(windows_before)
    if backbone.position_bias == 'parameterized' or backbone.pretrained_windows_given:
        right = windows_before
    else:
        right = right_windows(fmt, prefix, theirs, num_stages)[:num_stages]  # of the stages that are built
    assert report.pretrained_window_sizes == backbone.pretrained_window_sizes == right
    assert after['pretrained_windows'].tolist() == list(right)
    assert {*report.loaded, *report.converted, *report.initial} == set(after) - {'pretrained_windows'}
    held = {name for name, value in theirs.items() if isinstance(value, torch.Tensor)}
    assert used | set(report.left_out) | {f'{prefix}pretrained_windows'} >= held
    assert set(report.left_out) <= held - used
    return True


def build(position_bias='log_cpb', given_windows=False, out_indices=(0, 1)):
    """The backbone to load into."""
    windows = dict(pretrained_window_sizes=GIVEN) if given_windows else {}
    return SwinTransformerV2(
        ARCH, window_size=WINDOW, position_bias=position_bias, out_indices=out_indices, drop_path_rate=0.0, **windows
    )


def says_windows(fmt):
    """Whether a valid checkpoint of a format says its pretrained windows."""
    return fmt == 'swinv2_mm' or FORMATS[fmt].tables


def test_every_format_of_the_package_is_damaged_here():
    assert {*FORMATS, *ALIASES} == {one.name for one in formats.FORMATS}


@pytest.mark.parametrize('prefix', ['', 'backbone.', 'module.encoder.'])
@pytest.mark.parametrize('fmt', FORMATS)
def test_every_format_loads_whole(fmt, prefix):
    theirs = checkpoint(fmt, prefix)
    backbone = build(given_windows=not says_windows(fmt))
    assert check_load(backbone, {'model': theirs}, theirs, prefix)
    windows = PRETRAINED if says_windows(fmt) else GIVEN
    assert backbone.pretrained_window_sizes == windows
    ours = source()
    for name, value in backbone.state_dict().items():
        if name not in ('pretrained_windows', 'norm0.weight', 'norm0.bias'):
            assert torch.equal(value, ours[name]), name


def plain(theirs):
    """Names of the tensors that a mutation can compute with."""
    return [
        name
        for name, value in theirs.items()
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta and value.numel()
    ]


def drop(draw, theirs, fmt, prefix):
    for name in draw(st.sets(st.sampled_from(sorted(theirs)), min_size=1, max_size=draw(st.sampled_from((1, 2, 40))))):
        del theirs[name]


def drop_module(draw, theirs, fmt, prefix):
    stem = draw(st.sampled_from(sorted({name.rpartition('.')[0] for name in theirs})))
    for name in [name for name in theirs if name.startswith(stem)]:
        del theirs[name]


def rename(draw, theirs, fmt, prefix):
    name = draw(st.sampled_from(sorted(theirs)))
    new = draw(
        st.sampled_from((f'{name}.x', f'{name}x', f'x.{name}', f'x{name}', name[1:], name[:-1], name.replace('.', '_')))
    )
    theirs[new] = theirs.pop(name)


def swap(draw, theirs, fmt, prefix):
    names = sorted(theirs)
    first, second = (draw(st.sampled_from(names)) for _ in range(2))
    if draw(st.booleans()):  # whole modules
        depth = draw(st.integers(1, 5))
        first, second = ('.'.join(name.split('.')[:depth]) + '.' for name in (first, second))
    moved = {}
    for name, value in theirs.items():
        here, there = (first, second) if name.startswith(first) else (second, first)
        moved[there + name[len(here) :] if name.startswith(here) else name] = value
    theirs.clear()
    theirs.update(moved)


def renumber(draw, theirs, fmt, prefix):
    names = [name for name in sorted(theirs) if re.search(r'\d', name)]
    if not names:  # an earlier mutation dropped them
        return
    name = draw(st.sampled_from(names))
    number = draw(st.sampled_from(list(re.finditer(r'\d+', name))))
    new = name[: number.start()] + draw(st.sampled_from(('0', '1', '2', '3', '007', '-1', ''))) + name[number.end() :]
    if draw(st.booleans()):
        theirs[new] = theirs.pop(name)
    else:
        old_stem, new_stem = name[: number.end()], new[: len(new) - len(name) + number.end()]
        for other in [other for other in theirs if other.startswith(f'{old_stem}.')]:
            theirs[new_stem + other[len(old_stem) :]] = theirs.pop(other)


def reshape(draw, theirs, fmt, prefix):
    name = draw(st.sampled_from(plain(theirs)))
    value = theirs[name]
    dim = draw(st.integers(0, max(value.ndim - 1, 0)))
    shapes = {
        'flat': lambda: value.flatten(),
        'transposed': lambda: value.mT if value.ndim > 1 else value[:, None],
        'sliced': lambda: value.narrow(dim, 0, draw(st.integers(0, value.shape[dim]))) if value.ndim else value[None],
        'centre': lambda: value.narrow(dim, 1, value.shape[dim] - 2) if value.ndim and value.shape[dim] > 2 else value,
        'doubled': lambda: torch.cat((value, value), dim) if value.ndim else value.expand(2),
        'longer': lambda: torch.cat((value, value.narrow(dim, 0, 1)), dim) if value.ndim else value.expand(3),
        'unsqueezed': lambda: value.unsqueeze(dim),
        'first': lambda: value[0] if value.ndim else value,
        'scalar': lambda: value.flatten()[0],
        'flipped': lambda: value.flip(dim) if value.ndim else value,
    }
    theirs[name] = shapes[draw(st.sampled_from(sorted(shapes)))]()


DTYPES = ['float16', 'bfloat16', 'float64', 'int64', 'int32', 'uint8', 'bool', 'complex64']
DTYPES += ['float8_e4m3fn'] * hasattr(torch, 'float8_e4m3fn')  # from PyTorch 2.1 on


def cast(draw, theirs, fmt, prefix):
    dtype = getattr(torch, draw(st.sampled_from(DTYPES)))
    names = plain(theirs)
    for name in names if draw(st.booleans()) else [draw(st.sampled_from(names))]:
        if theirs[name].is_floating_point() or dtype != torch.float64:
            theirs[name] = theirs[name].to(dtype)


def spoil(draw, theirs, fmt, prefix):
    name = draw(st.sampled_from(plain(theirs)))
    value = theirs[name].double().flatten()
    value[draw(st.integers(0, value.numel() - 1))] = float(draw(st.sampled_from(('nan', 'inf', '-inf', '1e300'))))
    theirs[name] = value.view(theirs[name].shape).to(draw(st.sampled_from((torch.float64, torch.float32))))


def other_arch(draw, theirs, fmt, prefix):
    changes = draw(st.sampled_from(OTHERS))
    other = checkpoint(fmt, prefix, **changes)
    if draw(st.booleans()):
        theirs.clear()
        theirs.update(other)
    else:  # a part of it
        names = draw(st.sets(st.sampled_from(sorted(other)), min_size=1, max_size=draw(st.sampled_from((1, 2, 20)))))
        theirs.update({name: other[name] for name in names})


ODD = (
    'x',
    'norm',
    'norm.x',
    'norm7.weight',
    'q.weight',
    'layers.0.x',
    'layers.0.blocks.1.norm3.weight',
    'layers.0.blocks.0.attn.k_bias',
    'layers.0.blocks.0.attn.q.weight',
    'layers.0.blocks.99999999999.norm1.weight',
    'layers.9.blocks.0.attn.relative_coords_table',
    'relative_coords_table',
    'mask_token',
    'decoder.0.weight',
    'pretrained_windows',
    'two\nlines',
    '',
)


def add(draw, theirs, fmt, prefix):
    if draw(st.booleans()):
        names, value = [draw(st.sampled_from(ODD))], torch.rand(draw(st.sampled_from(((), (2,), (8,), (1, 7, 7, 2)))))
    else:  # what a reader of another format, or of the other names for one tensor, takes for one of the backbone
        ours, value = draw(st.sampled_from([item for item in sorted(source().items()) if '.' in item[0]]))
        other = draw(st.sampled_from((fmt, *sorted(FORMATS))))
        names = draw(st.sampled_from([their_names(other, ours), [their_name(other, ours)], [ours]]))
        names = draw(st.sampled_from([names, *([name] for name in norm_names(fmt, ours))]))
        value = value + 1
    values = value.chunk(len(names)) if len(names) > 1 else [value]
    place = draw(st.sampled_from(('', prefix, prefix, 'other.')))
    added = {place + name: value.clone() for name, value in zip(names, values)}
    everything = {**added, **theirs} if draw(st.booleans()) else {**theirs, **added}  # in either order
    theirs.clear()
    theirs.update(everything)


def add_second(draw, theirs, fmt, prefix):
    other = draw(st.sampled_from(sorted(FORMATS)))
    theirs.update({name: value + 1 for name, value in checkpoint(other, draw(st.sampled_from(('', 'ema.')))).items()})


def replace(draw, theirs, fmt, prefix):
    name = draw(st.sampled_from(sorted(theirs)))
    theirs[name] = draw(st.sampled_from((None, 'text', [1.0], {}, 0.5, np.ones(2), {'w': torch.ones(2)})))


def store(draw, theirs, fmt, prefix):
    name = draw(st.sampled_from(plain(theirs)))
    value = theirs[name]
    kinds = {
        'sparse': lambda: (value.float() if value.is_floating_point() else value).to_sparse(),
        'meta': lambda: value.to('meta'),
        'parameter': lambda: torch.nn.Parameter(value, requires_grad=value.is_floating_point()),
        'strided': lambda: torch.stack((value, value), -1)[..., 0],
        'expanded': lambda: value.flatten()[0].expand(value.shape),
    }
    theirs[name] = kinds[draw(st.sampled_from(sorted(kinds)))]()


def damage_windows(draw, theirs, fmt, prefix):
    names = [name for name in plain(theirs) if name.endswith(('pretrained_windows', 'relative_coords_table'))]
    if not names:
        return None
    name = draw(st.sampled_from(sorted(names)))
    value = theirs[name]
    if name.endswith('windows'):
        windows = ((6,), (6, 3, 3), (0, 3), (-6, 3), (6.5, 3.0), (6.0, 3.0), ((6, 3),), (5, 5), (), 6, (True, True))
        theirs[name] = torch.tensor(draw(st.sampled_from(windows)))
        return None
    table = value.to(torch.float64, copy=True)
    how = draw(st.sampled_from(('scaled', 'corner', 'zero', 'other', 'linear', 'all')))
    number = draw(st.sampled_from((0.0, -1.0, 1e-30, 1e-17, 1e-12, 1e-6, 0.01, 0.9, 1.1, 3.9, 4.0, 1e6, 1e30, 1e300)))
    if how == 'corner':
        table.view(-1)[-2:] = number
    elif how == 'other':
        table = coordinates(draw(st.integers(1, 5)), draw(st.sampled_from(PRETRAINED)))
    elif how == 'linear':
        table = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 7)] * 2, indexing='ij'), -1)[None]
    else:
        table = table * (0 if how == 'zero' else number)
    dtype = draw(st.sampled_from((torch.float32, torch.float64)))
    for other in names if how == 'all' else [name]:
        theirs[other] = table.to(dtype)
    return None


MUTATIONS = (
    *(drop, drop_module, rename, swap, renumber, reshape, cast, spoil, other_arch, add, add_second, replace, store),
    *(damage_windows, damage_windows, cast, add),
)


def test_a_mutated_checkpoint_loads_whole_or_not_at_all():
    outcomes = Counter()
    # The last hypothesis for 3.8 draws fewer that load.
    examples = DRAWS * (1000 if sys.version_info >= (3, 9) else 1600)

    @settings(max_examples=examples)
    @given(st.data())
    def check(data):
        draw = data.draw
        fmt = draw(st.sampled_from((*sorted(FORMATS), 'swinv2_mm', 'swinv2_mm')))
        prefix = draw(st.sampled_from(('', '', 'backbone.', 'module.encoder.')))
        kind = draw(st.sampled_from(('log_cpb', 'log_cpb', 'linear_cpb', 'parameterized')))
        kind = kind if fmt == 'swinv2_mm' else 'log_cpb'
        theirs = checkpoint(fmt, prefix, position_bias=kind)
        mutations = draw(st.lists(st.sampled_from(MUTATIONS), max_size=2))
        for mutate in mutations:
            if theirs:
                mutate(draw, theirs, fmt, prefix)
        given_windows = kind != 'parameterized' and draw(st.booleans())
        backbone = build(kind, given_windows, draw(st.sampled_from(((0, 1), (1,), (0,)))))
        wrapper = draw(st.sampled_from((None, 'model', 'state_dict', 'model_ema')))
        loaded = check_load(backbone, {wrapper: theirs} if wrapper else theirs, theirs, prefix)
        outcome = f'{"mutated" if mutations else "intact"} {"loaded" if loaded else "refused"}'
        event(outcome)
        outcomes[outcome] += 1
        if not mutations:
            assert loaded == (given_windows or kind == 'parameterized' or says_windows(fmt))

    check()
    assert outcomes['intact loaded'] >= 50
    assert outcomes['mutated loaded'] >= 80
    assert outcomes['mutated refused'] >= 300


def change(part, function):
    """A damage: a function of the tensors whose names end in a part."""

    def damage(theirs):
        names = [name for name in theirs if name.endswith(part)]
        assert names
        theirs.update({name: function(theirs[name]) for name in names})

    return damage


def extra(name, like):
    """A damage: a second tensor that makes the same one of the backbone, of other values."""
    return lambda theirs: theirs.update({name: source()[like] + 1})


def first(damage):
    """The extra tensor stands before all others."""

    def reordered(theirs):
        names = list(theirs)
        damage(theirs)
        for name in names:
            theirs[name] = theirs.pop(name)

    return reordered


NORM = extra('norm1.weight', 'norm1.weight')
CLASSIFIER_NORM = extra('norm.weight', 'norm1.weight')
JOINED = extra('encoder.layers.0.blocks.0.attention.self.qkv.weight', 'layers.0.blocks.0.attn.qkv.weight')
Q_BIAS = extra('features.1.0.attn.q_bias', 'layers.0.blocks.0.attn.q_bias')
SPLIT = {f'layers.0.blocks.0.attn.{part}.weight': torch.ones(8, 8) for part in 'qkv'}
REFUSED = {
    'tables of nearly zeros': ('official', change('coords_table', lambda table: table * 1e-30)),
    'tables of small numbers': ('official', change('coords_table', lambda table: table * 1e-6)),
    'sparse tables': ('official', change('coords_table', torch.Tensor.to_sparse)),
    'tables without data': ('official', change('coords_table', lambda table: table.to('meta'))),
    'tables of nothing': ('official', change('coords_table', lambda table: table[..., :0])),
    'a table of no block': ('official', extra('relative_coords_table', 'norm0.weight')),
    'a table of a stage': ('official', extra('layers.0.relative_coords_table', 'norm0.weight')),
    'sparse windows': ('swinv2_mm', change('pretrained_windows', torch.Tensor.to_sparse)),
    'windows of no tokens': ('swinv2_mm', change('pretrained_windows', lambda windows: windows - 3)),
    'negative windows': ('swinv2_mm', change('pretrained_windows', torch.Tensor.neg)),
    'windows that are no whole numbers': ('swinv2_mm', change('pretrained_windows', lambda windows: windows + 0.5)),
    'a window too many': ('swinv2_mm', change('pretrained_windows', lambda windows: windows[[0, 0, 1]])),
    'windows without data': ('swinv2_mm', change('pretrained_windows', lambda windows: windows.to('meta'))),
    'heads that do not divide channels': ('official', change('logit_scale', lambda scale: scale[:1].expand(3, 1, 1))),
    'no heads': ('official', change('logit_scale', lambda scale: scale[:0])),
    'scales without heads': ('official', change('logit_scale', lambda scale: scale.sum())),
    'no channels': ('official', change('patch_embed.proj.weight', lambda weight: weight[:0])),
    'a block far away': ('official', extra('layers.0.blocks.99999999999.norm1.weight', 'norm0.weight')),
    'a name of two lines': ('official', extra('two\nlines', 'norm0.weight')),
    'two last norms': ('official', NORM),
    'two last norms, ours first': ('official', first(NORM)),
    'two last norms of ours': ('swinv2_mm', CLASSIFIER_NORM),
    'two last norms of ours, the other first': ('swinv2_mm', first(CLASSIFIER_NORM)),
    'queries joined and apart': ('transformers', JOINED),
    'queries joined first and apart': ('transformers', first(JOINED)),
    'queries apart and joined': ('official', lambda theirs: theirs.update(SPLIT)),
    'biases joined and apart': ('torchvision', Q_BIAS),
    'biases joined first and apart': ('torchvision', first(Q_BIAS)),
    'integer queries': ('transformers', change('query.weight', torch.Tensor.long)),
    'sparse queries': ('transformers', change('query.weight', torch.Tensor.to_sparse)),
    'queries without data': ('transformers', change('query.weight', lambda weight: weight.to('meta'))),
    'sparse biases': ('torchvision', change('qkv.bias', torch.Tensor.to_sparse)),
    'sparse patch merging': ('mmpretrain', change('reduction.weight', torch.Tensor.to_sparse)),
    'a value that float32 cannot hold': ('timm', change('fc1.bias', lambda bias: bias.double() + 1e300)),
}
if hasattr(torch, 'float8_e5m2'):  # from PyTorch 2.1 on
    REFUSED['queries of 8 bits'] = 'transformers', change('query.weight', lambda x: x.to(torch.float8_e5m2))


@pytest.mark.parametrize('damage', REFUSED)
def test_a_damage_that_could_go_unseen_is_refused(damage):
    fmt, apply = REFUSED[damage]
    theirs = checkpoint(fmt)
    apply(theirs)
    assert not check_load(build(given_windows=not says_windows(fmt)), theirs, theirs, '')


@pytest.mark.parametrize('stage', [0, 1])
@pytest.mark.parametrize('damage', ['missing', 'sparse', 'flat', 'empty', 'integer', 'complex'])
def test_a_damaged_table_of_biases_is_refused(damage, stage):
    theirs = checkpoint('swinv2_mm', position_bias='parameterized')
    name = f'layers.{stage}.blocks.0.attn.relative_position_bias_table.weight'
    table = theirs.pop(name)
    damaged = {'sparse': table.to_sparse(), 'flat': table.flatten(), 'empty': table[:0], 'integer': table.long()}
    damaged['complex'] = table[:9].to(torch.complex64)  # of another window
    if damage != 'missing':
        theirs[name] = damaged[damage]
    assert not check_load(build('parameterized'), theirs, theirs, '')


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
@pytest.mark.parametrize('fmt', ['swinv2_mm', 'mmpretrain', 'official'])
@pytest.mark.parametrize('stage', [0, 1])
def test_what_the_backbone_does_not_return_is_left_out_by_its_names_in_the_file(fmt, prefix, stage):
    theirs = checkpoint(fmt, prefix)
    assert check_load(build(out_indices=(stage,)), theirs, theirs, prefix)


def test_a_checkpoint_that_holds_itself_is_refused():
    theirs = {}
    theirs['model'] = theirs
    handler = signal.signal(signal.SIGALRM, lambda *_: pytest.fail('it never ends'))
    signal.alarm(5)
    try:
        assert not check_load(build(), theirs, theirs, '')
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


FILES = ('x.pth', 'legacy.pth', 'x.safetensors')


def write(fmt, path):
    theirs = checkpoint(fmt)
    if path.suffix == '.safetensors':
        safetensors.torch.save_file(theirs, path)
    else:
        torch.save({'model': theirs}, path, _use_new_zipfile_serialization='legacy' not in path.name)
    return path.read_bytes()


def read_alone(path):
    """What the library that wrote a file reads from it."""
    if path.suffix == '.safetensors':
        return safetensors.torch.load_file(path)
    return torch.load(path, map_location='cpu', weights_only=True)['model']  # wherever it says that tensors were


def test_a_damaged_file_loads_whole_or_not_at_all(tmp_path):
    outcomes = Counter()
    contents = {}
    for fmt in ('swinv2_mm', 'official'):
        for name in FILES:
            contents[fmt, name] = write(fmt, tmp_path / name)

    @settings(max_examples=300 * DRAWS)
    @given(st.data())
    def check(data):
        draw = data.draw
        fmt, name = draw(st.sampled_from(sorted(contents)))
        content = bytearray(contents[fmt, name])
        damage = draw(st.sampled_from(('none', 'truncated', 'overwritten', 'overwritten', 'prepended', 'appended')))
        offset = draw(st.integers(0, 3000) | st.integers(0, len(content)))
        offset = len(content) - offset if draw(st.booleans()) else offset
        if damage == 'truncated':
            del content[offset:]
        elif damage == 'overwritten':
            noise = draw(st.binary(min_size=1, max_size=8))
            content[offset : offset + len(noise)] = noise[: len(content) - offset]
        elif damage != 'none':
            noise = draw(st.binary(min_size=1, max_size=64))
            content = noise + content if damage == 'prepended' else content + noise
        path = tmp_path / name
        path.write_bytes(content)
        try:
            theirs = read_alone(path)
        except Exception:  # if it loads all the same, what is damaged is none of the weights
            theirs = checkpoint(fmt)
        loaded = check_load(build(), path, theirs, '')
        if damage == 'none':
            assert loaded
        elif damage == 'truncated' and offset < len(contents[fmt, name]):
            assert not loaded
        outcome = f'{damage} {"loaded" if loaded else "refused"}'
        event(outcome)
        outcomes[outcome] += 1

    check()
    assert outcomes['none loaded'] >= 5
    assert outcomes['truncated refused'] >= 5
    assert outcomes['overwritten loaded'] >= 5
    assert outcomes['overwritten refused'] >= 5
