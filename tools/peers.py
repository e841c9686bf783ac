"""Other implementations of Swin V2, each as a backbone with a pyramid of four maps, for tests and benchmarks."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_mm import SwinTransformerV2
from swinv2_mm.arch import Arch, parse_arch

ORACLES = Path(sys.prefix, 'oracles')  # where tools/install.py puts them


def import_libraries() -> SimpleNamespace:
    """Import timm, torchvision and mmpretrain's backbones, from the environment or from a folder of their own in it.

    In that folder nothing else sees them: there is no torchvision for a torch without CUDA in the registry, so it lacks
    its operators, and whatever imports it there fails. mmpretrain's multimodal models do not import beside
    transformers 5.

    Raises:
        ImportError: one of them is not installed.
    """
    sys.path.append(str(ORACLES))
    try:
        torchvision = _import_torchvision()
        import timm

        sys.modules.setdefault('mmpretrain.models.multimodal', ModuleType('multimodal'))
        from mmpretrain.models import backbones
    finally:
        sys.path.remove(str(ORACLES))
    return SimpleNamespace(torchvision=torchvision, timm=timm, mmpretrain=backbones)


def _import_torchvision():
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition('.')[0] == 'torchvision']:
            del sys.modules[name]
        for operator in ('nms', 'qnms'):
            torch.library.define(f'torchvision::{operator}', '(Tensor dets, Tensor scores, float threshold) -> Tensor')
        import torchvision
    return torchvision
