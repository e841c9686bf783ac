"""What other implementations of Swin Transformers call the arguments of the backbone.

They are the official repository, timm, transformers, torchvision, mmpretrain, mmdet's `SwinTransformer` (V1) and
detectron2's configs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .arch import ARCHS

ARCH = 'arch=dict(embed_dims=..., depths=..., num_heads=...)'
ANY_SIZE = 'not needed: images may have any size'
FIXED = 'not needed: there is only one kind'
NO_HEAD = 'not needed: there is no classifier'
OUR_NAMES = {
    **dict.fromkeys(('embed_dim', 'embed_dims', 'depths', 'num_heads', 'num_layers'), ARCH),
    **dict.fromkeys(
        ('extra_norm_every_n_blocks', 'extra_norm_period'), 'arch=dict(extra_norm_every_n_blocks=..., ...)'
    ),
    **dict.fromkeys(('model_size', 'model_name', 'variant', 'size'), "arch='tiny' and so on"),
    **dict.fromkeys(('in_chans', 'num_channels', 'in_chan', 'in_dim'), 'in_channels'),
    **dict.fromkeys(('img_size', 'image_size', 'input_size', 'pretrain_img_size', 'pad_small_map'), ANY_SIZE),
    **dict.fromkeys(('strict_img_size', 'dynamic_img_size', 'always_partition', 'feat_size'), ANY_SIZE),
    **dict.fromkeys(('patch_sizes', 'strides', 'patch_strides'), 'patch_size'),
    **dict.fromkeys(('window', 'windows', 'window_sizes', 'win_size', 'ws'), 'window_size'),
    **dict.fromkeys(('pretrained_window_size', 'pretrained_windows'), 'pretrained_window_sizes'),
    **dict.fromkeys(('use_checkpoint', 'with_checkpoint', 'grad_checkpointing', 'gradient_checkpointing'), 'with_cp'),
    **dict.fromkeys(
        ('pretrained', 'pretrained_path', 'checkpoint', 'checkpoint_path', 'weights'),
        "init_cfg=dict(type='Pretrained', checkpoint=PATH_OR_URL)",
    ),
    **dict.fromkeys(('drop', 'dropout', 'proj_drop_rate', 'pos_drop_rate', 'hidden_dropout_prob'), 'drop_rate'),
    **dict.fromkeys(('attn_drop', 'attention_dropout', 'attention_probs_dropout_prob'), 'attn_drop_rate'),
    **dict.fromkeys(('drop_path', 'drop_path_prob', 'stochastic_depth_prob'), 'drop_path_rate'),
    **dict.fromkeys(('out_features', 'out_stages', 'out_levels'), 'out_indices'),
    **dict.fromkeys(('freeze_at', 'frozen', 'freeze_stages'), 'frozen_stages'),
    **dict.fromkeys(
        ('norm_layer', 'norm_cfg', 'patch_cfg', 'act_layer', 'act_cfg', 'hidden_act', 'layer_norm_eps'), FIXED
    ),
    **dict.fromkeys(
        ('patch_norm', 'interpolate_mode', 'qk_scale', 'ape', 'use_abs_pos_embed', 'use_absolute_embeddings'), FIXED
    ),
    **dict.fromkeys(('final_norm', 'initializer_range', 'stage_cfgs', 'downsample_layer', 'block'), FIXED),
    **dict.fromkeys(('num_classes', 'global_pool', 'with_cls_token', 'num_labels'), NO_HEAD),
    'convert_weights': 'not needed: every published format loads',
    **dict.fromkeys(('device', 'dtype'), 'not needed: use the method to()'),
    'norm_eval': 'not needed: there is no batch norm',
}
ARCH_NAME = re.compile(r'(?:swin)?[-_]?(?:transformer)?[-_]?(?:v2)?[-_]?([a-z]+)', re.IGNORECASE)


def refuse_other_names(arch: object, others: Iterable[str]) -> None:
    """Raise an error of one line that says what unknown arguments and other names of an arch are called here.

    Args:
        arch (object): the argument ``arch``, which may be a name such as ``swin_t``.
        others (Iterable[str]): names of unknown arguments.

    Raises:
        TypeError: there are unknown arguments.
        ValueError: only the arch has another name.
    """
    told = [f'{name} is {OUR_NAMES[name]}' for name in others if name in OUR_NAMES]
    told += [f'{name} is unknown' for name in others if name not in OUR_NAMES]
    match = ARCH_NAME.fullmatch(arch) if isinstance(arch, str) and arch not in ARCHS else None
    full = next((name for name in ARCHS if match and match[1].lower() in (name, name[0])), None)
    if full:
        told.append(f'arch={arch!r} is arch={full!r}')
    if told:
        kind = TypeError if others else ValueError
        raise kind(f'SwinTransformerV2 has other names for its arguments: {"; ".join(told)}')
