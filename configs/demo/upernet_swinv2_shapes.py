"""A small SwinV2 with a slim UPerNet on the data set that tools/misc/draw_dataset.py draws."""

_base_ = '../upernet_swinv2.py'

classes = ('background', 'disc', 'square', 'triangle', 'star', 'cross', 'ring')
data_root = 'data/shapes/ade'
palette = [(40, 40, 40), (230, 60, 60), (60, 120, 240), (50, 180, 80), (240, 190, 40), (170, 80, 220), (40, 200, 210)]
size = (128, 128)
max_iters = 1250
norm_cfg = dict(type='BN', requires_grad=True)
loss = dict(class_weight=[0.2] + [1.0] * 6)  # most pixels are background

model = dict(
    data_preprocessor=dict(size=size),
    backbone=dict(
        # few blocks where there are many tokens; at 64 pixels, where it is pretrained, the windows are 4, 4, 4 and 2
        arch=dict(_delete_=True, embed_dims=32, depths=(1, 1, 2, 2), num_heads=(1, 2, 4, 8)),
        window_size=8,
        drop_path_rate=0.0,
        out_indices=(0, 1, 2, 3),
        init_cfg=None,
    ),
    decode_head=dict(
        in_channels=[32, 64, 128, 256],
        in_index=[0, 1, 2, 3],
        channels=64,
        dropout_ratio=0,
        num_classes=len(classes),
        norm_cfg=norm_cfg,
        loss_decode=loss,
    ),
    auxiliary_head=dict(
        in_channels=128,
        channels=32,
        dropout_ratio=0,
        num_classes=len(classes),
        norm_cfg=norm_cfg,
        loss_decode=loss,
    ),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=False),
    dict(type='Resize', scale=size),
    dict(type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=size),
    dict(type='LoadAnnotations', reduce_zero_label=False),
    dict(type='PackSegInputs'),
]
dataset = dict(
    type='BaseSegDataset', data_root=data_root, metainfo=dict(classes=classes, palette=palette), reduce_zero_label=False
)
train_dataloader = dict(batch_size=4, num_workers=1, dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(num_workers=1, dataset=dict(**dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader
_base_.tta_pipeline[1].transforms[0] = [dict(type='Resize', scale=(side, side)) for side in (128, 96, 160)]

train_cfg = dict(max_iters=max_iters, val_interval=max_iters // 2)
optim_wrapper = dict(
    optimizer=dict(lr=1e-2), paramwise_cfg=dict(decay_rate=1.0, custom_keys=dict(backbone=dict(lr_mult=0.1)))
)
auto_scale_lr = dict(enable=False, base_batch_size=4)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=20),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=20, end=max_iters, eta_min=0),
]
default_hooks = dict(checkpoint=dict(interval=max_iters // 2, max_keep_ckpts=2), logger=dict(interval=10))
log_processor = dict(by_epoch=False, window_size=10)
