"""Cascade Mask R-CNN with SwinV2-T, window 32, on COCO for 36 epochs, from the checkpoint of window 16."""

_base_ = '../cascade_mask_rcnn_swinv2.py'

model = dict(backbone=dict(window_size=32))
