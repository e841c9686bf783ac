"""Mask2Former with SwinV2-B, window 24, from ImageNet-22K and 1K, on ADE20K, crops of 640 pixels, in bfloat16."""

_base_ = [
    'mmseg::mask2former/mask2former_swin-b-in22k-384x384-pre_8xb2-160k_ade20k-640x640.py',
    '../_base_/swinv2_base_patch4_window12to24_192to384_22kto1k_ft.py',
    '../_base_/mask2former_paramwise.py',
    '../_base_/ade20k_views.py',
]

custom_imports = dict(imports=['mmdet.models', 'swinv2_mm'])
model = dict(backbone=dict(_base_.pop('backbone'), _delete_=True, drop_path_rate=0.3))
optim_wrapper = dict(
    type='BFloat16OptimWrapper',
    constructor='SwinV2OptimWrapperConstructor',
    paramwise_cfg=dict(_base_.pop('paramwise_cfg'), _delete_=True, decay_rate=0.95),
)

_base_.tta_pipeline[1].transforms[0] = _base_.pop('views').crops_640
