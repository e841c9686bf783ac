"""Mixed precision training in bfloat16, on any device and with any detector or segmentor."""

from contextlib import contextmanager

import torch
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.utils import apply_to
from torch import Tensor, nn


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """`OptimWrapper` that extracts features under bfloat16 autocast and leaves heads and losses in float32.

    bfloat16 has the exponent range of float32 and needs no loss scaling. mmengine's `AmpOptimWrapper` scales all the
    same, refuses to run without a GPU, and takes the heads into autocast, where mmcv has no bfloat16 kernels for
    RoIAlign and NMS. Arguments are those of `OptimWrapper`.
    """

    @contextmanager
    def optim_context(self, model: nn.Module):
        """The context of the forward pass of ``model``, a detector or segmentor with `extract_feat`."""
        with super().optim_context(model), bfloat16_features(model):
            yield


@contextmanager
def bfloat16_features(model: nn.Module):
    """Within this context, backbone and neck (`extract_feat`) run under bfloat16 autocast and give float32 maps."""
    model = model.module if is_model_wrapper(model) else model
    extract_feat = model.extract_feat
    device = next(model.parameters()).device.type

    def extract(*args, **kwargs):
        with torch.autocast(device, torch.bfloat16):
            features = extract_feat(*args, **kwargs)
        return apply_to(features, lambda x: isinstance(x, Tensor), Tensor.float)

    model.extract_feat = extract
    try:
        yield
    finally:
        del model.extract_feat
