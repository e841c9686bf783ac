"""torchvision: stages and patch mergings alternate in one list, and the bias of qkv has a part for the keys."""

from __future__ import annotations

from ..files import CheckpointError
from .base import Format, rename_parts

to_our_name = rename_parts(
    {
        'features.0.0': 'patch_embed.proj',
        'features.0.2': 'patch_embed.norm',
        **{f'features.{2 * i + 1}': f'layers.{i}.blocks' for i in range(4)},
        **{f'features.{2 * i + 2}': f'layers.{i}.downsample' for i in range(3)},
        'mlp.0': 'mlp.fc1',
        'mlp.3': 'mlp.fc2',
    }
)


def drop_key_bias(name, tensors):
    """Split the bias of qkv, (3C,), into those of queries and values, (C,) each; the forward pass zeroes the keys'.

    Raises:
        CheckpointError: it has another shape.
    """
    if not name.endswith('attn.qkv.bias'):
        return None
    bias, stem = tensors[name], name[: -len('qkv.bias')]
    if bias.ndim != 1 or len(bias) % 3:
        raise CheckpointError(f'{name} must be (3C,), got {tuple(bias.shape)}: the file is damaged')
    q_bias, _, v_bias = bias.chunk(3)
    return {f'{stem}q_bias': q_bias, f'{stem}v_bias': v_bias}


FORMATS = (
    Format(
        'torchvision',
        'features.0.0.weight',
        r'features\.1\.',
        to_our_name,
        drop_key_bias,
        'key bias dropped, which the forward pass zeroes',
    ),
)
