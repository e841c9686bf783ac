"""Mask R-CNN with SwinV2-S, window 16, on COCO for 36 epochs at several scales, in bfloat16."""

_base_ = ['./mask-rcnn_swinv2-t-w16_fpn_ms-crop-3x_coco.py', '../_base_/swinv2_small_patch4_window16_256.py']

model = dict(backbone=_base_.pop('backbone'))
optim_wrapper = dict(type='BFloat16OptimWrapper')
