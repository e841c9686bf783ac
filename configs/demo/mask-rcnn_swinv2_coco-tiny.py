"""A small SwinV2 with a slim Mask R-CNN for a few photos of COCO, to see how fast it learns them from some start.

So few photos say nothing of others, so nothing is validated or tested.
"""

_base_ = 'mask-rcnn_swinv2_shapes.py'

data_root = 'data/coco_tiny/'
num_classes = 80
max_iters = 300
strides = [4, 8, 16, 32]

model = dict(
    backbone=dict(
        # as tools/analysis_tools/compare_position_biases.py pretrains it, with twice its window
        arch=dict(_delete_=True, embed_dims=32, depths=(1, 3), num_heads=(2, 4)),
        patch_size=2,
        window_size=16,
        out_indices=(1,),
    ),
    neck=dict(in_channels=[64], num_outs=4),
    rpn_head=dict(anchor_generator=dict(scales=[6], strides=strides)),
    roi_head=dict(
        bbox_roi_extractor=dict(featmap_strides=strides),
        bbox_head=dict(num_classes=num_classes),
        mask_roi_extractor=dict(featmap_strides=strides),
        mask_head=dict(num_classes=num_classes),
    ),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(160, 160), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='CocoDataset',
        data_root=data_root,
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    )
)
val_dataloader = val_cfg = val_evaluator = None
test_dataloader = test_cfg = test_evaluator = None

train_cfg = dict(max_iters=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=40),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=40, end=max_iters, eta_min=0),
]
default_hooks = dict(checkpoint=dict(interval=max_iters))
