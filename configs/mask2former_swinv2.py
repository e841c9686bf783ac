"""Mask2Former with SwinV2-T, window 16, on COCO instance segmentation for 50 epochs."""

_base_ = [
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
    '_base_/swinv2_tiny_patch4_window16_256.py',
    '_base_/mask2former_paramwise.py',
    '_base_/coco_tta.py',
]

custom_imports = dict(imports=['swinv2_mm'])
model = dict(
    backbone=dict(_base_.pop('backbone'), _delete_=True, drop_path_rate=0.3),
    panoptic_head=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    constructor='SwinV2OptimWrapperConstructor',
    paramwise_cfg=dict(_base_.pop('paramwise_cfg'), _delete_=True),
)
# The host's recipe does not use the panoptic maps but still names their folder, which would then have to exist.
train_dataloader = dict(dataset=dict(data_prefix=dict(_delete_=True, img='train2017/')))
val_dataloader = dict(dataset=dict(data_prefix=dict(_delete_=True, img='val2017/')))
test_dataloader = val_dataloader
