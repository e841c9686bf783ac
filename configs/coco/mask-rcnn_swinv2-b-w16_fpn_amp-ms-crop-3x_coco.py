"""Mask R-CNN with SwinV2-B, window 16, on COCO for 36 epochs at several scales, in bfloat16."""

_base_ = './mask-rcnn_swinv2-t-w16_fpn_ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        arch='base',
        init_cfg=dict(
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v2.0.0/'
            'swinv2_base_patch4_window16_256.pth',
        ),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(type='BFloat16OptimWrapper')
