"""Cascade Mask R-CNN with SwinV2-B, window 24, from ImageNet-22K and 1K, on COCO for 36 epochs, in bfloat16."""

_base_ = [
    './cascade-mask-rcnn_swinv2-b-w16_fpn_amp-ms-3x_coco.py',
    '../_base_/swinv2_base_patch4_window12to24_192to384_22kto1k_ft.py',
]

model = dict(backbone=_base_.pop('backbone'))
