"""Cascade Mask R-CNN with SwinV2-T, window 16, on COCO for 36 epochs.

The recipe of the paper's ablations (arXiv 2111.09883, appendix A1.2): shorter side 480 to 800, AdamW with learning rate
1e-4 and weight decay 0.05, batch 16, 3x schedule. Heads, losses and the rest of the schedule are those of mmdet. The
paper's runs may start from other weights than the released file here.
"""

_base_ = [
    'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    '_base_/swinv2_tiny_patch4_window16_256.py',
    '_base_/coco_tta.py',
]

custom_imports = dict(imports=['swinv2_mm'])
model = dict(
    backbone=dict(_base_.pop('backbone'), _delete_=True, drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

train_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomChoiceResize', scales=[(side, 1333) for side in range(480, 801, 32)], keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

max_epochs = 36
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', begin=0, end=max_epochs, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
optim_wrapper = dict(
    constructor='SwinV2OptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
