"""The arguments of a backbone, from the names and shapes of its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from ..arch import Arch, arch_argument, parse_arch
from ..position_bias import POSITION_BIASES

BLOCK = re.compile(r'layers\.(\d+)\.blocks\.(\d+)\.')
FIRST_BLOCK = 'layers.0.blocks.0.'
FIRST_ATTENTION = re.compile(rf'{re.escape(FIRST_BLOCK)}attn\.(\w+)')


def infer_arguments(weights: Mapping[str, Tensor]) -> dict | None:
    """The arguments of the `SwinTransformerV2` that has these weights.

    Args:
        weights (Mapping): tensors by their names in the backbone.

    Returns:
        dict: ``arch``, as its name if it has one, ``in_channels``, ``patch_size``, ``mlp_ratio``, ``qkv_bias`` and
        ``position_bias``. None if a weight that shows one of them is missing, or no backbone has such weights.
    """
    try:
        arch = _infer_arch(weights)
        _, in_channels, patch_size, _ = weights['patch_embed.proj.weight'].shape
        mlp_ratio = _infer_mlp_ratio(weights, last_stage=len(arch.depths) - 1)
        parse_arch(arch._asdict())
        in_attention = {match[1] for name in weights if (match := FIRST_ATTENTION.match(name))}
        position_bias = next(kind for kind, bias in POSITION_BIASES.items() if bias.name in in_attention)
        if sum(arch.depths) > len(weights):  # a late block is named, but blocks before it are missing
            return None
    except (KeyError, ValueError, IndexError, StopIteration, ZeroDivisionError):
        return None
    return dict(
        arch=arch_argument(arch),
        in_channels=in_channels,
        patch_size=patch_size,
        mlp_ratio=mlp_ratio,
        qkv_bias=f'{FIRST_BLOCK}attn.q_bias' in weights,
        position_bias=position_bias,
    )


def _infer_arch(weights):
    blocks = {(int(match[1]), int(match[2])) for name in weights if (match := BLOCK.match(name))}
    depths = {}
    for stage, block in blocks:
        depths[stage] = max(depths.get(stage, 0), block + 1)
    return Arch(
        weights['patch_embed.proj.weight'].shape[0],
        tuple(depths[i] for i in range(len(depths))),
        tuple(weights[f'layers.{i}.blocks.0.attn.logit_scale'].shape[0] for i in range(len(depths))),
        min((j + 1 for i, j in blocks if f'layers.{i}.blocks.{j}.norm3.weight' in weights), default=0),
    )


def _infer_mlp_ratio(weights, last_stage):
    """The hidden dimension over the input dimension, in the widest stage, where rounding changes it least."""
    hidden, channels = weights[f'layers.{last_stage}.blocks.0.mlp.fc1.weight'].shape
    ratio = hidden / channels
    if int(ratio * channels) < hidden:  # the division rounded down
        ratio = float(np.nextafter(ratio, np.inf))
    return ratio
