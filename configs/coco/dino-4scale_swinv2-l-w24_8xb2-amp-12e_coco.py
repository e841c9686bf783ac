"""DINO with 4 scales with SwinV2-L, window 24, from ImageNet-22K and 1K, on COCO for 12 epochs, in bfloat16."""

_base_ = [
    './dino-4scale_swinv2-t-w16_8xb2-12e_coco.py',
    '../_base_/swinv2_large_patch4_window12to24_192to384_22kto1k_ft.py',
]

model = dict(
    backbone=dict(_base_.pop('backbone'), with_cp=True),
    neck=dict(in_channels=[384, 768, 1536]),
)
optim_wrapper = dict(type='BFloat16OptimWrapper')
