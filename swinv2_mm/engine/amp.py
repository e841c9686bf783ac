"""Mixed precision training in bfloat16, on any device and with any detector or segmentor."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from mmengine.model import BaseModel, is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.utils import apply_to
from torch import Tensor, nn

from .sharding import is_sharded

CURE = 'and only that runs in bfloat16: train it in float32, with optim_wrapper.type=OptimWrapper and no --amp bf16'


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """`OptimWrapper` that extracts features under bfloat16 autocast and leaves heads and losses in float32.

    bfloat16 has the exponent range of float32 and needs no loss scaling. mmengine's `AmpOptimWrapper` scales the loss
    anyway, refuses to run without a GPU, and runs the heads under autocast too, although mmcv has no bfloat16 kernels
    for RoIAlign and NMS. Arguments are those of `OptimWrapper`.
    """

    @contextmanager
    def optim_context(self, model: nn.Module):
        """The context of the forward pass of ``model``, a detector or segmentor.

        Raises:
            ValueError: no model in it has `extract_feat`, or the forward pass did not call it.
        """
        with super().optim_context(model), bfloat16_features(model):
            yield


@contextmanager
def bfloat16_features(model: nn.Module):
    """Within this context, backbone and neck (`extract_feat`) run under bfloat16 autocast and return float32 maps.

    So do those of detectors inside the model, such as the student and the teacher of a semi-supervised one.

    Raises:
        ValueError: see `feature_extractors`; or nothing called `extract_feat`.
    """
    extractors, ran = feature_extractors(model), []
    before = [vars(module).get('extract_feat') for module in extractors]
    parameter = next(model.parameters())
    device = parameter.device.type
    keeps_casts = not is_sharded(parameter)  # else each process would hold all weights in bfloat16

    def in_bfloat16(extract_feat):
        def extract(*args, **kwargs):
            ran.append(True)
            with torch.autocast(device, torch.bfloat16, cache_enabled=keeps_casts):
                features = extract_feat(*args, **kwargs)
            return apply_to(features, lambda x: isinstance(x, Tensor), Tensor.float)

        return extract

    for module in extractors:
        module.extract_feat = in_bfloat16(module.extract_feat)
    try:
        yield
    finally:
        for module, own in zip(extractors, before):
            vars(module).pop('extract_feat', None)  # del fails where a train_step is compiled
            if own is not None:
                module.extract_feat = own
    if not ran:
        raise ValueError(f'{type(extractors[0]).__name__} does not call its extract_feat, {CURE}')


def feature_extractors(model: nn.Module) -> list[nn.Module]:
    """The detectors and segmentors in a model that have `extract_feat`, including the model itself.

    Raises:
        ValueError: there are none.
    """
    model = model.module if is_model_wrapper(model) else model
    models = [module for module in model.modules() if module is model or isinstance(module, BaseModel)]
    extractors = [module for module in models if hasattr(module, 'extract_feat')]
    if not extractors:
        raise ValueError(f'{type(model).__name__} has no extract_feat, {CURE}')
    return extractors
