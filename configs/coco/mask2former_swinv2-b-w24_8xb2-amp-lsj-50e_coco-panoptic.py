"""Mask2Former with SwinV2-B, window 24, from ImageNet-22K and 1K, on COCO panoptic for 50 epochs, in bfloat16."""

_base_ = [
    './mask2former_swinv2-t-w16_8xb2-lsj-50e_coco-panoptic.py',
    '../_base_/swinv2_base_patch4_window12to24_192to384_22kto1k_ft.py',
]

model = dict(
    backbone=_base_.pop('backbone'),
    panoptic_head=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(type='BFloat16OptimWrapper')
