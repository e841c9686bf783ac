"""Mask R-CNN with SwinV2-S, window 16, on COCO for 36 epochs at several scales, in bfloat16."""

_base_ = './mask-rcnn_swinv2-t-w16_fpn_ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        arch='small',
        init_cfg=dict(
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v2.0.0/'
            'swinv2_small_patch4_window16_256.pth',
        ),
    ),
)
optim_wrapper = dict(type='BFloat16OptimWrapper')
