"""Mask2Former with SwinV2-T, window 16, on ADE20K, crops of 512 pixels, 160k iterations.

This is mmseg's recipe, in which the backbone learns at a tenth of the rate, with the paper's layer decay of 0.95.
"""

_base_ = [
    'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py',
    '../_base_/swinv2_tiny_patch4_window16_256.py',
    '../_base_/mask2former_paramwise.py',
    '../_base_/ade20k_views.py',
]

custom_imports = dict(imports=['mmdet.models', 'swinv2_mm'])
model = dict(
    backbone=dict(_base_.pop('backbone'), _delete_=True, drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    constructor='SwinV2OptimWrapperConstructor',
    paramwise_cfg=dict(_base_.pop('paramwise_cfg'), _delete_=True, decay_rate=0.95),
)

_base_.tta_pipeline[1].transforms[0] = _base_.pop('views').crops_512
