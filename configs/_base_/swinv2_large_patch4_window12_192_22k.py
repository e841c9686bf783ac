"""SwinV2-L, trained on ImageNet-22K at 192 pixels with window 12."""

backbone = dict(
    type='SwinTransformerV2',
    arch='large',
    window_size=12,
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/SwinTransformer/storage/releases/download/v2.0.0/'
        'swinv2_large_patch4_window12_192_22k.pth',
    ),
)
