"""UPerNet with SwinV2-S, window 16, on ADE20K, crops of 512 pixels, 160k iterations, in bfloat16."""

_base_ = ['../upernet_swinv2.py', '../_base_/swinv2_small_patch4_window16_256.py']

model = dict(backbone=_base_.pop('backbone'))
optim_wrapper = dict(type='BFloat16OptimWrapper')
