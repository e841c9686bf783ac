"""DINO with 4 scales with SwinV2-T, window 16, on COCO for 12 epochs."""

_base_ = [
    'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
    '../_base_/swinv2_tiny_patch4_window16_256.py',
    '../_base_/coco_tta.py',
]

custom_imports = dict(imports=['swinv2_mm'])
model = dict(
    backbone=dict(_base_.pop('backbone'), _delete_=True, out_indices=(1, 2, 3), drop_path_rate=0.2),
    neck=dict(in_channels=[192, 384, 768]),
)
optim_wrapper = dict(constructor='SwinV2OptimWrapperConstructor')
auto_scale_lr = dict(enable=False)
_base_.tta_pipeline[1].transforms[2] = [dict(type='LoadAnnotations', with_bbox=True)]
