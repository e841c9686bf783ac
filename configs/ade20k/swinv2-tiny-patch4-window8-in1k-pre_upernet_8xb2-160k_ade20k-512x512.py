"""UPerNet with SwinV2-T, window 8, on ADE20K, crops of 512 pixels, 160k iterations."""

_base_ = ['../upernet_swinv2.py', '../_base_/swinv2_tiny_patch4_window8_256.py']

model = dict(backbone=_base_.pop('backbone'))
