"""Cascade Mask R-CNN with SwinV2-B, window 16, on COCO for 36 epochs, in bfloat16."""

_base_ = ['../cascade_mask_rcnn_swinv2.py', '../_base_/swinv2_base_patch4_window16_256.py']

model = dict(
    backbone=_base_.pop('backbone'),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(type='BFloat16OptimWrapper')
