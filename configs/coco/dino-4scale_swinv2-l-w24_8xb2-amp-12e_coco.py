"""DINO of 4 scales with SwinV2-L, window 24, from ImageNet-22K and 1K, on COCO for 12 epochs, in bfloat16."""

_base_ = './dino-4scale_swinv2-t-w16_8xb2-12e_coco.py'

model = dict(
    backbone=dict(
        arch='large',
        window_size=24,
        with_cp=True,
        init_cfg=dict(
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v2.0.0/'
            'swinv2_large_patch4_window12to24_192to384_22kto1k_ft.pth',
        ),
    ),
    neck=dict(in_channels=[384, 768, 1536]),
)
optim_wrapper = dict(type='BFloat16OptimWrapper')
