"""Mask2Former with SwinV2-B, window 24, from ImageNet-22K and 1K, on instances of COCO for 50 epochs, in bfloat16."""

_base_ = '../mask2former_swinv2.py'

model = dict(
    backbone=dict(
        arch='base',
        window_size=24,
        init_cfg=dict(
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v2.0.0/'
            'swinv2_base_patch4_window12to24_192to384_22kto1k_ft.pth',
        ),
    ),
    panoptic_head=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(type='BFloat16OptimWrapper')
