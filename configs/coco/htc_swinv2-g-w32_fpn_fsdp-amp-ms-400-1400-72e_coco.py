"""HTC++ with SwinV2-G, window 32, on COCO for 72 epochs, in bfloat16, sharded."""

_base_ = ['./htc_swinv2-g-w32_fpn_amp-ms-400-1400-72e_coco.py', '../_base_/sharded.py']
