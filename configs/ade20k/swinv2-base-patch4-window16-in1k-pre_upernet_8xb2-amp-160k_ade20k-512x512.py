"""UPerNet with SwinV2-B, window 16, on ADE20K, crops of 512 pixels, 160k iterations, in bfloat16."""

_base_ = ['../upernet_swinv2.py', '../_base_/swinv2_base_patch4_window16_256.py']

model = dict(
    backbone=_base_.pop('backbone'),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
optim_wrapper = dict(type='BFloat16OptimWrapper')
