"""Mixed precision training in bfloat16, on any device and with every detector."""

from contextlib import contextmanager

import torch
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

FLOAT32_OPS = ('RoIAlign', 'RoIPool')  # of mmcv, which has no bfloat16 kernel for them


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """`OptimWrapper` that runs the forward pass under bfloat16 autocast.

    bfloat16 has the exponent range of float32 and needs no loss scaling. mmengine's `AmpOptimWrapper` scales all the
    same, refuses to run without a GPU, and leaves the pooling of mmcv to fail in bfloat16; here it runs in float32.
    Arguments are those of `OptimWrapper`.
    """

    @contextmanager
    def optim_context(self, model: nn.Module):
        """The context of the forward pass of ``model``."""
        with super().optim_context(model), float32_ops(model), torch.autocast(get_device(), torch.bfloat16):
            yield


@contextmanager
def float32_ops(model: nn.Module):
    """Within this context, the layers of ``model`` named in ``FLOAT32_OPS`` compute in float32.

    Their output has the dtype of their first input.
    """

    layers = [module for module in model.modules() if type(module).__name__ in FLOAT32_OPS]
    for layer in layers:
        layer.forward = lambda x, rois, forward=layer.forward: forward(x.float(), rois.float()).to(x.dtype)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
