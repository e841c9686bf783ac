"""Mask R-CNN with SwinV2-T, window 16, on COCO for 36 epochs at several scales (mmdet's 3x Swin recipe)."""

_base_ = [
    'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py',
    '../_base_/swinv2_tiny_patch4_window16_256.py',
    '../_base_/coco_tta.py',
]

custom_imports = dict(imports=['swinv2_mm'])
model = dict(backbone=dict(_base_.pop('backbone'), _delete_=True, drop_path_rate=0.2))
optim_wrapper = dict(constructor='SwinV2OptimWrapperConstructor', paramwise_cfg=dict(_delete_=True))
