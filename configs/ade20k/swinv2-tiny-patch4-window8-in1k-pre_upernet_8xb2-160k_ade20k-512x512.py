"""UPerNet with SwinV2-T, window 8, on ADE20K, crops of 512 pixels, 160k iterations."""

_base_ = '../upernet_swinv2.py'

model = dict(
    backbone=dict(
        window_size=8,
        init_cfg=dict(
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v2.0.0/'
            'swinv2_tiny_patch4_window8_256.pth',
        ),
    ),
)
