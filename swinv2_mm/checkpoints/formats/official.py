"""The official repository, its SimMIM, and ours, which has the same names.

Official files hold tables of coordinates, which show the windows. Ours hold the windows as a buffer.
"""

from __future__ import annotations

import torch

from ...position_bias import log_spaced_coordinates
from ..files import CheckpointError
from .base import Format, rename_parts

ANCHOR = 'patch_embed.proj.weight'
MAX_TABLE = 1024  # tokens: each block has a table of (2W - 1)**2 offsets, which is 34 MB there
# The position MLP has this name in the files of SimMIM and in those that were fine-tuned from them.
to_our_name = rename_parts({'rpe_mlp': 'cpb_mlp'})


def export(weights, pretrained_windows):
    """Add the table of log-spaced coordinates, (1, 2P-1, 2P-1, 2), to every block.

    Raises:
        CheckpointError: the tables would be too large.
    """
    if max(pretrained_windows) > MAX_TABLE:
        raise CheckpointError(
            f'official files hold tables of the windows, of {MAX_TABLE} tokens at most here, and these are '
            f'{pretrained_windows}: convert to another format, or pass the right --pretrained-window-sizes'
        )
    tables = {}
    for name in weights:
        if name.endswith('logit_scale'):
            window = pretrained_windows[int(name.split('.')[1])]
            table = log_spaced_coordinates(window, window, window, dtype=torch.float32)
            tables[name.replace('logit_scale', 'relative_coords_table')] = table[None]
    return {**weights, **tables}


FORMATS = (
    Format('swinv2_mm', ANCHOR, r'pretrained_windows$'),
    Format('SimMIM', ANCHOR, r'mask_token$', to_our_name),
    Format('official', ANCHOR, r'layers\.0\.downsample\.', to_our_name, export=export, wrapper='model'),
)
