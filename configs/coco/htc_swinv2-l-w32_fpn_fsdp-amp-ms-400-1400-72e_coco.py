"""HTC++ with SwinV2-L, window 32, on COCO for 72 epochs, in bfloat16, sharded."""

_base_ = ['../htc_swinv2.py', '../_base_/sharded.py']
