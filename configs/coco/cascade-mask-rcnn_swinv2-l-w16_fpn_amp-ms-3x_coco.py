"""Cascade Mask R-CNN with SwinV2-L, window 16, from ImageNet-22K and 1K, on COCO for 36 epochs, in bfloat16."""

_base_ = ['../cascade_mask_rcnn_swinv2.py', '../_base_/swinv2_large_patch4_window12to16_192to256_22kto1k_ft.py']

model = dict(
    backbone=dict(_base_.pop('backbone'), with_cp=True),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
optim_wrapper = dict(type='BFloat16OptimWrapper')
