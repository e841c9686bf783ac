"""Mask R-CNN with SwinV2-T, window 8, on COCO for 12 epochs."""

_base_ = '../mask_rcnn_swinv2.py'

model = dict(
    backbone=dict(
        window_size=8,
        init_cfg=dict(
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v2.0.0/'
            'swinv2_tiny_patch4_window8_256.pth',
        ),
    ),
)
