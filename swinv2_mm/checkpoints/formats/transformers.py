"""transformers: queries, keys and values have weights of their own, and weights do not show the windows."""

from __future__ import annotations

from .base import ConfigFile, Format, image_of_one_window, join_qkv, rename_parts, shared_settings, split_qkv

OUR_PARTS = {
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
to_our_name = rename_parts(OUR_PARTS)
to_their_name = rename_parts({ours: theirs for theirs, ours in OUR_PARTS.items()})


def export(weights, pretrained_windows):
    return {to_their_name(name): value for name, value in split_qkv(weights).items()}


def write_config(arguments, pretrained_windows):
    return dict(
        model_type='swinv2',
        architectures=['Swinv2Model'],
        image_size=image_of_one_window(arguments, pretrained_windows),
        num_channels=arguments['in_channels'],
        **shared_settings(arguments, pretrained_windows),
    )


def read_config(config, num_stages):
    config = config.get('backbone_config') or config  # of a detector or segmentor
    return config if config.get('model_type') == 'swinv2' else None


FORMATS = (
    Format(
        'transformers',
        'embeddings.patch_embeddings.projection.weight',
        r'encoder\.layers\.',
        to_our_name,
        join_qkv,
        'q, k, v joined',
        export=export,
        config=ConfigFile(
            write_config,
            read_config,
            computed_here={
                'hidden_act': ('gelu', 'gelu_python'),
                'layer_norm_eps': (1e-5,),
                'use_absolute_embeddings': (False,),
            },
        ),
    ),
)
