"""SwinV2-B, trained on ImageNet-22K at 192 pixels with window 12, then on ImageNet-1K at 256 pixels with window 16."""

backbone = dict(
    type='SwinTransformerV2',
    arch='base',
    window_size=16,
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/SwinTransformer/storage/releases/download/v2.0.0/'
        'swinv2_base_patch4_window12to16_192to256_22kto1k_ft.pth',
    ),
)
