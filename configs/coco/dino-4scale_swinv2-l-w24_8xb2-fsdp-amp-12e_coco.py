"""DINO with 4 scales with SwinV2-L, window 24, on COCO for 12 epochs, in bfloat16, sharded."""

_base_ = ['./dino-4scale_swinv2-l-w24_8xb2-amp-12e_coco.py', '../_base_/sharded.py']
