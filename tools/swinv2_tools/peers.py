"""Peers: other implementations of Swin V2, each as a backbone with four maps, for benchmarks and tests."""

from __future__ import annotations

import importlib
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

FOLDER = Path(sys.prefix, 'peers')  # where tools/install.py puts them


class NotAvailableError(Exception):
    """A peer is not installed, or does not support a size. The message is one line."""


def import_libraries(*names: str) -> SimpleNamespace:
    """Import timm, torchvision and mmpretrain's backbones, from the environment or from a folder of their own in it.

    Their folder hides them from everything else: PyPI has no torchvision for a torch without CUDA, so its operators are
    missing, and libraries that import it fail. mmpretrain's multimodal models do not import with transformers 5.

    Args:
        names (str): which of the three; torchvision comes with each, because the others import it. By default all.

    Raises:
        ImportError: one of them is not installed.
    """
    sys.path.append(str(FOLDER))
    try:
        found = SimpleNamespace(torchvision=_import_torchvision())
        if not names or 'timm' in names:
            found.timm = importlib.import_module('timm')
        if not names or 'mmpretrain' in names:
            sys.modules.setdefault('mmpretrain.models.multimodal', ModuleType('multimodal'))
            found.mmpretrain = importlib.import_module('mmpretrain.models').backbones
    finally:
        sys.path.remove(str(FOLDER))
    return found


def build(name: str, arch: str, size: tuple[int, int], window: int, official: str | None = None) -> nn.Module:
    """Build an implementation with random weights, without stochastic depth.

    Args:
        name (str): ``swinv2_mm`` or one of `PEERS`.
        arch (str): as in `SwinTransformerV2`.
        size (tuple[int]): height and width of the image in pixels.
        window (int): window size in tokens, for all stages.
        official (str, optional): path of the official ``models/swin_transformer_v2.py``.

    Returns:
        nn.Module: an image ``(B, 3, H, W)`` of that size to a sequence of four maps.

    Raises:
        NotAvailableError: it is not installed, or does not support this.
    """
    if name == 'swinv2_mm':
        return SwinTransformerV2(arch, window_size=window, drop_path_rate=0.0)
    try:
        return PEERS[name](parse_arch(arch), size, window, official)
    except ImportError as error:
        raise NotAvailableError(f'{name} is not installed: {error}') from error


class Padded(nn.Module):
    """A backbone that needs whole patches: it gets the image zero-padded to them."""

    def __init__(self, backbone: nn.Module, maps: Callable = tuple):
        super().__init__()
        self.backbone, self.maps = backbone, maps

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        height, width = image.shape[-2:]
        return self.maps(self.backbone(F.pad(image, (0, -width % 4, 0, -height % 4))))


class StageByStage(nn.Module):
    """The map after the last block of every stage, of a classifier with ``layers`` and ``patch_embed``."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.patch_embed, self.layers = classifier.patch_embed, classifier.layers

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        maps, x = [], self.patch_embed(image)
        for layer in self.layers:
            for block in layer.blocks:
                x = block(x)
            maps.append(x)
            if layer.downsample is not None:
                x = layer.downsample(x)
        return tuple(maps)


def _transformers(arch: Arch, size, window, _):
    from transformers import Swinv2Backbone, Swinv2Config

    stages = [f'stage{i}' for i in range(1, len(arch.depths) + 1)]
    config = Swinv2Config(image_size=_whole_patches(size), out_features=stages, **_arguments(arch, window))
    return Padded(Swinv2Backbone(config), maps=lambda out: out.feature_maps)


def _timm(arch: Arch, size, window, _):
    model = import_libraries('timm').timm.create_model(
        'swinv2_tiny_window8_256', features_only=True, img_size=_whole_patches(size), **_arguments(arch, window)
    )
    return Padded(model)


def _mmpretrain(arch: Arch, size, window, _):
    return import_libraries('mmpretrain').mmpretrain.SwinTransformerV2(
        arch=dict(arch._asdict()),
        img_size=size,
        window_size=[min(window, -(-min(size) // stride)) for stride in (4, 8, 16, 32)],  # it does not shrink them
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.0,
        pad_small_map=True,
    )


def _torchvision(arch: Arch, size, window, _):
    swin = import_libraries('torchvision').torchvision.models.swin_transformer
    arguments = _arguments(arch, [window, window], drop_path='stochastic_depth_prob')
    classifier = swin.SwinTransformer(
        patch_size=[4, 4], block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2, **arguments
    )
    stem, *stages = classifier.features
    layers = [nn.Module() for _ in arch.depths]
    for layer, blocks, downsample in zip(layers, stages[::2], [*stages[1::2], None]):
        layer.blocks, layer.downsample = blocks, downsample
    classifier.patch_embed, classifier.layers = stem, nn.ModuleList(layers)
    return Padded(StageByStage(classifier))


def _official(arch: Arch, size, window, path):
    if path is None:
        raise NotAvailableError('official is in no package: pass --official PATH_OF_swin_transformer_v2.py')
    if arch.extra_norm_every_n_blocks:
        raise NotAvailableError('official has no extra norms')
    if any(side % 32 or (side // 4 // 2**i) % min(window, side // 4 // 2**i) for side in size for i in range(4)):
        raise NotAvailableError(f'official needs maps that divide into windows, not {size[0]}x{size[1]}')
    import_libraries('timm')
    spec = importlib.util.spec_from_file_location('official_swin_transformer_v2', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.compile imports it by its name
    spec.loader.exec_module(module)
    return StageByStage(module.SwinTransformerV2(img_size=size, num_classes=0, **_arguments(arch, window)))


def _arguments(arch, window, drop_path='drop_path_rate'):
    """The arguments that have the same names in several peers."""
    names = dict(embed_dim=arch.embed_dims, depths=arch.depths, num_heads=arch.num_heads, window_size=window)
    return {**names, drop_path: 0.0}


def _whole_patches(size):
    return [side + -side % 4 for side in size]


PEERS = {
    'transformers': _transformers,
    'timm': _timm,
    'mmpretrain': _mmpretrain,
    'torchvision': _torchvision,
    'official': _official,
}


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
