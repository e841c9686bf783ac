"""Swin Transformer V2 for OpenMMLab.

Importing the package registers the backbone, its optimizer constructor, its runners, its strategy and its model for
test-time augmentation with mmengine, and makes mmengine read checkpoints without running code from them.
"""

import mmengine
from mmengine.utils import digit_version

if digit_version(mmengine.__version__) < digit_version('0.8.0'):
    raise ImportError(
        'swinv2_mm needs mmengine 0.8 or later, as mmdet 3 and mmseg 1 do, and this environment has '
        f'{mmengine.__version__}: pip install mmengine==0.10.7'
    )

from .backbone import SwinTransformerV2
from .checkpoints import mmengine_reading
from .checkpoints.files import CheckpointError
from .checkpoints.loading import load_pretrained
from .checkpoints.report import LoadReport
from .engine.amp import BFloat16OptimWrapper
from .engine.flexible_runner import SwinV2FlexibleRunner
from .engine.optim import SwinV2OptimWrapperConstructor
from .engine.runner import SwinV2Runner
from .engine.strategy import SwinV2FSDPStrategy
from .engine.tta import InstanceTTAModel
from .ops import flop_counters

flop_counters.register()
mmengine_reading.register()

__all__ = [
    'BFloat16OptimWrapper',
    'CheckpointError',
    'InstanceTTAModel',
    'LoadReport',
    'SwinTransformerV2',
    'SwinV2FSDPStrategy',
    'SwinV2FlexibleRunner',
    'SwinV2OptimWrapperConstructor',
    'SwinV2Runner',
    'load_pretrained',
]
__version__ = '0.1.0'
