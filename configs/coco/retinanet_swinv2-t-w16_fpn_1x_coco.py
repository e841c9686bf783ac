"""RetinaNet with SwinV2-T, window 16, on COCO for 12 epochs, with AdamW where mmdet's Swin recipe has SGD."""

_base_ = [
    'mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py',
    '../_base_/swinv2_tiny_patch4_window16_256.py',
    '../_base_/coco_tta.py',
]

custom_imports = dict(imports=['swinv2_mm'])
model = dict(backbone=dict(_base_.pop('backbone'), _delete_=True, out_indices=(1, 2, 3), drop_path_rate=0.2))
optim_wrapper = dict(
    constructor='SwinV2OptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
_base_.tta_pipeline[1].transforms[2] = [dict(type='LoadAnnotations', with_bbox=True)]
