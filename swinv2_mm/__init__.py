"""Swin Transformer V2 for OpenMMLab; importing it registers the backbone."""

from .backbone import SwinTransformerV2

__all__ = ['SwinTransformerV2']
__version__ = '0.1.0'
