"""SwinV2-T, trained on ImageNet-1K at 256 pixels with window 16."""

backbone = dict(
    type='SwinTransformerV2',
    arch='tiny',
    window_size=16,
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/SwinTransformer/storage/releases/download/v2.0.0/'
        'swinv2_tiny_patch4_window16_256.pth',
    ),
)
