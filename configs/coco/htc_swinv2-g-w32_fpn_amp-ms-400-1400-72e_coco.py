"""HTC++ with SwinV2-G, window 32, on COCO for 72 epochs, in bfloat16.

Differs from the paper as `htc_swinv2.py` does, and: the paper's G was pretrained on 70 million private images and its
weights were never published, so there is no checkpoint to name here. Pass one of your own with `--checkpoint FILE`.
"""

_base_ = '../htc_swinv2.py'

model = dict(
    backbone=dict(arch='giant', init_cfg=None),
    neck=dict(in_channels=[512, 1024, 2048, 4096]),
)
