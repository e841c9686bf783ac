"""Mask2Former with SwinV2-B, window 24, from ImageNet-22K and 1K, on ADE20K, crops of 640 pixels, in bfloat16."""

_base_ = 'mmseg::mask2former/mask2former_swin-b-in22k-384x384-pre_8xb2-160k_ade20k-640x640.py'

custom_imports = dict(imports=['mmdet.models', 'swinv2_mm'])
model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformerV2',
        arch='base',
        window_size=24,
        drop_path_rate=0.3,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v2.0.0/'
            'swinv2_base_patch4_window12to24_192to384_22kto1k_ft.pth',
        ),
    ),
)
optim_wrapper = dict(
    type='BFloat16OptimWrapper',
    constructor='SwinV2OptimWrapperConstructor',
    paramwise_cfg=dict(
        _delete_=True,
        decay_rate=0.95,
        custom_keys=dict(
            backbone=dict(lr_mult=0.1),
            query_embed=dict(decay_mult=0.0),
            query_feat=dict(decay_mult=0.0),
            level_embed=dict(decay_mult=0.0),
        ),
    ),
)
