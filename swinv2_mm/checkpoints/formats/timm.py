"""timm: patch merging begins a stage, and weights do not show the windows."""

from __future__ import annotations

from ...arch import ARCHS
from ..file_names import limit_to_maps, sizes_in_name
from .base import ConfigFile, Format, image_of_one_window, rename_parts, shared_settings, shift_downsample

ANCHOR = 'patch_embed.proj.weight'
undo_features_only = rename_parts({f'layers_{i}': f'layers.{i}' for i in range(4)})


def to_our_name(name):
    return shift_downsample(name, -1)


def export(weights, pretrained_windows):
    return {shift_downsample(name, 1): value for name, value in weights.items()}


def write_config(arguments, pretrained_windows):
    settings = dict(
        img_size=image_of_one_window(arguments, pretrained_windows),
        in_chans=arguments['in_channels'],
        **shared_settings(arguments, pretrained_windows),
    )
    return dict(
        architecture='swinv2_tiny_window8_256',  # any that timm knows: the arguments replace all of it
        num_classes=0,
        pretrained_cfg={},
        model_args=settings,
    )


def read_config(config, num_stages):
    """What the name of the architecture says, and the arguments that replace it."""
    if 'architecture' not in config:
        return None
    window, new_window, image, new_image = sizes_in_name(config['architecture'])
    settings = {'window_size': new_window, 'image_size': new_image}
    if new_window != window:
        settings['pretrained_window_sizes'] = limit_to_maps(window, image, num_stages, patch_size=4)
    for size, arch in ARCHS.items():
        if f'_{size}_' in config['architecture']:
            settings.update(embed_dim=arch.embed_dims, depths=arch.depths, num_heads=arch.num_heads)
    arguments = config.get('model_args') or {}
    return {**settings, **arguments, 'image_size': arguments.get('img_size', new_image)}


FORMATS = (
    Format(
        'timm',
        ANCHOR,
        r'layers\.\d+\.downsample\.',
        to_our_name,
        export=export,
        needs_last_norm=True,  # also where only features are taken
        config=ConfigFile(
            write_config,
            read_config,
            # The LayerNorm that timm has by default has our epsilon, and those that a config can name have another.
            computed_here={'act_layer': ('gelu',), 'norm_layer': ()},
            per_axis=True,
        ),
    ),
    Format('timm features_only', ANCHOR, r'layers_\d+\.', lambda name: to_our_name(undo_features_only(name))),
)
