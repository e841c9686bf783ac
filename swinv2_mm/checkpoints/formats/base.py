"""What makes up a checkpoint format, and what several formats share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ...arch import parse_arch
from ..files import CheckpointError


def keep_name(name: str) -> str:
    """The name itself."""
    return name


def keep_tensor(name: str, tensors: Mapping[str, Tensor]) -> None:
    """None: the tensor is a weight of the backbone as it is."""


class ConfigFile(NamedTuple):
    """The ``config.json`` that a library needs beside the weights.

    Attributes:
        write (Callable): from the backbone's arguments (`infer_arguments`) and its pretrained windows, one per stage,
            to what the file holds.
        read (Callable): from what a file holds and the number of stages to the settings in it, under the names of
            transformers. None if it is of another library; any error means that it is malformed.
        computed_here (Mapping): settings that weights do not show, and the values with which the library computes
            what our backbone does, the usual one first.
        per_axis (bool): whether rows and columns each have a pretrained window, where ours share one.
    """

    write: Callable[[Mapping, tuple[int, ...]], dict]
    read: Callable[[dict, int], Mapping | None]
    computed_here: Mapping[str, tuple] = MappingProxyType({})
    per_axis: bool = False


class Format(NamedTuple):
    """How a library saves a Swin V2.

    Names are those of tensors after the prefix that all of a backbone share. "Our" names are those in the state dict
    of `SwinTransformerV2`. No function changes what it is given.

    Attributes:
        name (str): what reports and ``convert_checkpoint.py --to`` call it.
        anchor (str): the name of the filters of the patch embedding; what stands before it in a file is the prefix.
        mark (str): a pattern that some name matches at its start. The first format of the list that fits is taken.
        to_our_name (Callable): from a name to ours.
        rearrange (Callable): from one of our names and all tensors by our names to the weights made from this tensor,
            by our names. {} if they are made from another tensor, None if this tensor is a weight as it is. It raises
            a `CheckpointError` if a shape is wrong.
        rearranged (str): what `rearrange` does to a tensor, for reports.
        export (Callable, optional): the way back, from weights by our names, whose only output norm is called ``norm``,
            and the pretrained windows, one per stage, to tensors by the library's names.
        needs_last_norm (bool): whether the library loads no file without the norm of the last stage.
        wrapper (str, optional): the key under which a ``.pth`` file of the library holds its tensors.
        config (ConfigFile, optional): the ``config.json`` of the library.
    """

    name: str
    anchor: str
    mark: str
    to_our_name: Callable[[str], str] = keep_name
    rearrange: Callable[[str, Mapping[str, Tensor]], Mapping[str, Tensor] | None] = keep_tensor
    rearranged: str = ''
    export: Callable[[Mapping[str, Tensor], tuple[int, ...]], dict[str, Tensor]] | None = None
    needs_last_norm: bool = False
    wrapper: str | None = None
    config: ConfigFile | None = None


def rename_parts(parts: Mapping[str, str]) -> Callable[[str], str]:
    """A function that replaces parts of a dotted name, the longest first.

    Args:
        parts (Mapping): from whole parts between dots, one or several, to what replaces them.
    """
    longest_first = sorted(parts, key=len, reverse=True)
    pattern = re.compile(rf'(?<![^.])({"|".join(map(re.escape, longest_first))})(?![^.])')
    return lambda name: pattern.sub(lambda match: parts[match[1]], name)


def shift_downsample(name: str, by: int) -> str:
    """Add ``by`` to the number of the stage that a patch merging belongs to. Other names stay as they are.

    In some libraries patch merging begins a stage. Here it ends the one before.
    """
    return re.sub(r'^layers\.(\d+)(?=\.downsample\.)', lambda match: f'layers.{int(match[1]) + by}', name)


def join_qkv(name: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
    """Join the weights of queries, keys and values, (C, C) each, to one of (3C, C); a `rearrange` of `Format`.

    Args:
        name (str): our name of a tensor. Those to join end in ``attn.q.weight`` and so on.
        tensors (Mapping): all tensors by our names.

    Raises:
        CheckpointError: they differ in shape or dtype, or one is missing.
    """
    stem, attn, leaf = name.rpartition('attn.')
    if leaf in ('k.weight', 'v.weight') and f'{stem}{attn}q.weight' in tensors:
        return {}  # goes with q.weight
    if leaf != 'q.weight':
        return None
    parts = [tensors.get(f'{stem}{attn}{letter}.weight') for letter in 'qkv']
    kinds = {None if part is None else (part.shape, part.dtype) for part in parts}
    if len(kinds) > 1 or parts[0].ndim != 2:
        raise CheckpointError(f'{name} and those of k and v must be there in one shape and dtype: the file is damaged')
    return {f'{stem}{attn}qkv.weight': torch.cat(parts)}


def split_qkv(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `join_qkv`, for all weights of a backbone by our names."""
    split = {}
    for name, value in weights.items():
        if name.endswith('attn.qkv.weight'):
            stem = name[: -len('qkv.weight')]
            split.update({f'{stem}{letter}.weight': part for letter, part in zip('qkv', value.chunk(3))})
        else:
            split[name] = value
    return split


def shared_settings(arguments: Mapping, pretrained_windows: tuple[int, ...]) -> dict:
    """The settings that transformers and timm call the same.

    Args:
        arguments (Mapping): of the backbone, as from `infer_arguments`.
        pretrained_windows (tuple[int]): in tokens, one per stage.
    """
    arch = parse_arch(arguments['arch'])
    return dict(
        patch_size=arguments['patch_size'],
        embed_dim=arch.embed_dims,
        depths=list(arch.depths),
        num_heads=list(arch.num_heads),
        window_size=max(pretrained_windows),
        pretrained_window_sizes=list(pretrained_windows),
        mlp_ratio=arguments['mlp_ratio'],
        qkv_bias=arguments['qkv_bias'],
    )


def image_of_one_window(arguments: Mapping, pretrained_windows: tuple[int, ...]) -> int:
    """The image size in pixels at which the last map is one window.

    Both libraries accept another size when they build the model.
    """
    num_stages = len(parse_arch(arguments['arch']).depths)
    return arguments['patch_size'] * 2 ** (num_stages - 1) * pretrained_windows[-1]
