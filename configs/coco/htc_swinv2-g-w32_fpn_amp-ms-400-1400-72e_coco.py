"""HTC++ with SwinV2-G, window 32, on COCO for 72 epochs, in bfloat16.

It differs from the paper as `htc_swinv2.py` does. The paper's G was pretrained on 70 million private images and its
weights were never published, so no checkpoint is named here. Pass one of your own with `--checkpoint FILE`.
"""

_base_ = '../htc_swinv2.py'

model = dict(
    backbone=dict(arch='giant', init_cfg=None),
    neck=dict(in_channels=[512, 1024, 2048, 4096]),
)
