"""Cascade Mask R-CNN with SwinV2-S, window 16, on COCO for 36 epochs, in bfloat16."""

_base_ = ['../cascade_mask_rcnn_swinv2.py', '../_base_/swinv2_small_patch4_window16_256.py']

model = dict(backbone=_base_.pop('backbone'))
optim_wrapper = dict(type='BFloat16OptimWrapper')
