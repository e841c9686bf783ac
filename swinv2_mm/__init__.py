"""Swin Transformer V2 for OpenMMLab; importing it registers the backbone and how to train it."""

from .amp import BFloat16OptimWrapper
from .backbone import SwinTransformerV2
from .checkpoint import LoadReport, load_pretrained
from .files import CheckpointError
from .optim import SwinV2OptimWrapperConstructor

__all__ = [
    'BFloat16OptimWrapper',
    'CheckpointError',
    'LoadReport',
    'SwinTransformerV2',
    'SwinV2OptimWrapperConstructor',
    'load_pretrained',
]
__version__ = '0.1.0'
