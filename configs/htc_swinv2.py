"""HTC++ with SwinV2-L, window 32, on COCO for 72 epochs, in bfloat16: the system-level recipe.

HTC with Soft-NMS, trained at shorter sides of 400 to 1400 from ImageNet-22K weights. Window 32 and images of up to 1536
pixels are the paper's (arXiv 2111.09883). Learning rate, weight decay, batch size, 72 epochs and their steps are those
of HTC++ in the Swin V1 paper (arXiv 2103.14030); those of the V2 paper may differ. Deliberate differences from the
papers:

- No semantic branch, so that no `stuffthingmaps` are needed.
- No InstaBoost, which needs a package of its own.
- No extra global attention after the backbone or the pyramid.
- In training the longer side is at most 1536, where Swin V1 has 1600. Images are not cropped or padded to that.
- In testing the shorter side is 1100, the longer at most 1536, and there is one scale unless `--tta` asks for several.
  `tools/test.py --window-size 48` tests with the paper's larger window.
- All parts learn at the same rate, and drop path is 0.2, as in the recipes of smaller models.
"""

_base_ = [
    'mmdet::htc/htc-without-semantic_r50_fpn_1x_coco.py',
    '_base_/swinv2_large_patch4_window12_192_22k.py',
    '_base_/coco_tta.py',
]

custom_imports = dict(imports=['swinv2_mm'])
model = dict(
    backbone=dict(_base_.pop('backbone'), _delete_=True, window_size=32, with_cp=True, drop_path_rate=0.2),
    neck=dict(in_channels=[192, 384, 768, 1536]),
    test_cfg=dict(rcnn=dict(nms=dict(type='soft_nms', iou_threshold=0.5))),
)

train_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomResize', scale=[(1536, 400), (1536, 1400)], keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='Resize', scale=(1536, 1100), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

tta_model = dict(tta_cfg=dict(nms=dict(type='soft_nms', iou_threshold=0.5)))
_base_.tta_pipeline[1].transforms[0] = [
    dict(type='Resize', scale=scale, keep_ratio=True) for scale in [(1536, 1100), (1152, 825), (1920, 1375)]
]

max_epochs = 72
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', begin=0, end=max_epochs, by_epoch=True, milestones=[63, 69], gamma=0.1),
]
optim_wrapper = dict(
    type='BFloat16OptimWrapper',
    constructor='SwinV2OptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
