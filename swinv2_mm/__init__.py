"""Swin Transformer V2 for OpenMMLab; importing it registers the backbone."""

from .amp import BFloat16OptimWrapper
from .backbone import SwinTransformerV2
from .checkpoint import CheckpointError, load_pretrained

__all__ = ['BFloat16OptimWrapper', 'CheckpointError', 'SwinTransformerV2', 'load_pretrained']
__version__ = '0.1.0'
