"""Swin Transformer V2 for OpenMMLab; importing it registers the backbone."""

from .amp import BFloat16OptimWrapper
from .backbone import SwinTransformerV2
from .checkpoint import LoadReport, load_pretrained
from .files import CheckpointError

__all__ = ['BFloat16OptimWrapper', 'CheckpointError', 'LoadReport', 'SwinTransformerV2', 'load_pretrained']
__version__ = '0.1.0'
