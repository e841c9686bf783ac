"""Mask R-CNN with SwinV2-T, window 8, on COCO for 12 epochs."""

_base_ = ['../mask_rcnn_swinv2.py', '../_base_/swinv2_tiny_patch4_window8_256.py']

model = dict(backbone=_base_.pop('backbone'))
