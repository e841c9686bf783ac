"""Mask R-CNN with SwinV2-B, window 16, on COCO for 36 epochs at several scales, in bfloat16."""

_base_ = ['./mask-rcnn_swinv2-t-w16_fpn_ms-crop-3x_coco.py', '../_base_/swinv2_base_patch4_window16_256.py']

model = dict(
    backbone=_base_.pop('backbone'),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(type='BFloat16OptimWrapper')
