"""mmpretrain: patch merging begins a stage and takes its four neighbours from `nn.Unfold`, in another order."""

from __future__ import annotations

from ..files import CheckpointError
from .base import Format, rename_parts, shift_downsample

rename = rename_parts(
    {
        'patch_embed.projection': 'patch_embed.proj',
        'stages': 'layers',
        'attn.w_msa': 'attn',
        'ffn.layers.0.0': 'mlp.fc1',
        'ffn.layers.1': 'mlp.fc2',
    }
)


def to_our_name(name):
    return shift_downsample(rename(name), -1)


def reorder_neighbours(name, tensors):
    """Reorder the inputs of a patch merging, (2C, 4C).

    `nn.Unfold` gives four neighbours for each channel, row by row. Ours are C channels for each neighbour, column by
    column.

    Raises:
        CheckpointError: the weight has another shape.
    """
    if not name.endswith('downsample.reduction.weight'):
        return None
    weight = tensors[name]
    if weight.ndim != 2 or weight.shape[1] % 4:
        raise CheckpointError(f'{name} must be (2C, 4C), got {tuple(weight.shape)}: the file is damaged')
    weight = weight.unflatten(1, (-1, 2, 2))  # (2C, C, row, column)
    return {name: weight.permute(0, 3, 2, 1).flatten(1)}  # (2C, 4C)


FORMATS = (
    Format(
        'mmpretrain',
        'patch_embed.projection.weight',
        r'stages\.',
        to_our_name,
        reorder_neighbours,
        'neighbours reordered',
    ),
)
