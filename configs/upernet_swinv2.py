"""UPerNet with SwinV2-T, window 16, on ADE20K, crops of 512 pixels, 160k iterations.

From the paper (arXiv 2111.09883, appendix): learning rate 4e-5, layer decay 0.95, drop path 0.3, batch 16. Everything
else, such as weight decay 0.01, warm-up and augmentation, is from mmseg's recipe for Swin.
"""

_base_ = [
    'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    '_base_/swinv2_tiny_patch4_window16_256.py',
    '_base_/ade20k_views.py',
]

custom_imports = dict(imports=['swinv2_mm'])
model = dict(backbone=dict(_base_.pop('backbone'), _delete_=True, drop_path_rate=0.3))
optim_wrapper = dict(
    constructor='SwinV2OptimWrapperConstructor',
    optimizer=dict(lr=4e-5),
    paramwise_cfg=dict(_delete_=True, decay_rate=0.95),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)

_base_.tta_pipeline[1].transforms[0] = _base_.pop('views').crops_512
