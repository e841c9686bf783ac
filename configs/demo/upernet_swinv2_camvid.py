"""A small SwinV2 with a slim UPerNet on CamVid, 240 x 180 pixels: how to bring a segmentation data set of your own.

The data set is a folder with an image and a PNG of labels for each frame, so mmseg's BaseSegDataset reads it, given the
names of the classes. docs/transfer.md says where the frames are from, and what starts it was trained from.
"""

_base_ = '../upernet_swinv2.py'

classes = 'sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign', 'fence', 'car', 'pedestrian', 'bicyclist'
palette = [
    *((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0)),
    *((192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192)),
]
data_root = 'data/camvid_240'
size, crop_size = (240, 180), (96, 96)  # width and height of a frame, height and width of a crop, in pixels
max_iters = 800
norm_cfg = dict(type='BN', requires_grad=True)

model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        # as tools/analysis_tools/compare_position_biases.py pretrains it, with twice its window
        arch=dict(_delete_=True, embed_dims=32, depths=(1, 3), num_heads=(2, 4)),
        patch_size=2,
        window_size=16,
        drop_path_rate=0.1,
        out_indices=(0, 1),
        init_cfg=None,
    ),
    decode_head=dict(
        in_channels=[32, 64],
        in_index=[0, 1],
        channels=32,
        dropout_ratio=0,
        num_classes=len(classes),
        norm_cfg=norm_cfg,
    ),
    auxiliary_head=dict(
        in_channels=64, in_index=1, channels=32, dropout_ratio=0, num_classes=len(classes), norm_cfg=norm_cfg
    ),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=False),
    dict(type='RandomResize', scale=size, ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=False),
    dict(type='PackSegInputs'),
]


# labels are 0 to 10, and 255 is ignored
dataset = dict(
    type='BaseSegDataset', data_root=data_root, metainfo=dict(classes=classes, palette=palette), reduce_zero_label=False
)
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='images/train', seg_map_path='annotations/train'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    num_workers=1,
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='images/val', seg_map_path='annotations/val'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    num_workers=1,
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='images/test', seg_map_path='annotations/test'),
        pipeline=test_pipeline,
    ),
)
_base_.tta_pipeline[1].transforms[0] = [
    dict(type='Resize', scale=(width, width * 3 // 4), keep_ratio=True) for width in (240, 180, 300)
]

train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(optimizer=dict(lr=3e-3), paramwise_cfg=dict(decay_rate=1.0))
auto_scale_lr = dict(enable=False, base_batch_size=8)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=1.0, by_epoch=False, begin=50, end=max_iters, eta_min=0),
]
default_hooks = dict(checkpoint=dict(interval=max_iters, max_keep_ckpts=1), logger=dict(interval=20))
log_processor = dict(by_epoch=False, window_size=20)
