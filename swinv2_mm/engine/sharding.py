"""Sharding a model among processes with PyTorch's FSDP: its units, and how values get from one process to all and back.

Every parameter is cut along its first dimension, and each process keeps one piece, with its gradient and optimizer
state (`torch.distributed.fsdp.fully_shard`, the ZeRO stage 3 of arXiv 1910.02054). A unit is what is gathered at once:
before its forward and backward pass all processes gather its parameters, and free them after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from mmengine.config import ConfigDict
from mmengine.dist import broadcast
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..backbone import SwinTransformerV2
from ..blocks import Block, PatchMerging
from ..checks.registered import builds

UNITS = Block, PatchMerging


def units(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model that become units: blocks and patch mergings of its backbones, and last the model itself.

    The model itself holds the rest, which is small: patch embedding, output norms, neck and heads. Neck and heads can't
    be units, because the hosts call other methods of theirs than `forward`, and FSDP gathers in `forward` alone.
    """
    backbones = [module for module in model.modules() if isinstance(module, SwinTransformerV2)]
    for backbone in backbones:
        yield from (module for module in backbone.modules() if isinstance(module, UNITS))
    yield model


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard a model in place among all processes. Its classes get FSDP's as a base; names of parameters stay.

    Args:
        model (nn.Module): on the CPU; parameters may be on the meta device.
        device (torch.device): where the pieces go.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in units(model):
        fully_shard(unit, mesh=mesh)


def with_backbones_on_meta(node: ConfigDict) -> ConfigDict:
    """A copy of a model's config that builds each `SwinTransformerV2` on the meta device, where it takes no memory.

    Other parts of a model may make tensors that are neither parameters nor buffers, such as anchors, so they need a
    real device.
    """
    if isinstance(node, Mapping):
        copy = ConfigDict({key: with_backbones_on_meta(value) for key, value in node.items()})
        return ConfigDict(type=_build_on_meta, backbone=copy) if builds(copy, SwinTransformerV2) else copy
    return type(node)(map(with_backbones_on_meta, node)) if isinstance(node, (list, tuple)) else node


def _build_on_meta(backbone):
    with torch.device('meta'):
        return MODELS.build(backbone)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The values of all parameters and buffers of a model by name, also of buffers that no state dict has."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: value.detach() for name, value in tensors}  # which stay on the CPU if the parameters leave it


def scatter(own: Tensor, value: Tensor | None) -> None:
    """Give every process its piece of a tensor, in place. All processes call it.

    Args:
        own (Tensor): of this process: a DTensor, or a tensor that every process has whole.
        value (Tensor, optional): the whole tensor, in the first process.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    if dist.get_rank() == 0:
        value = value.to(own.device, own.dtype).contiguous()
    else:
        value = torch.empty(own.shape, dtype=own.dtype, device=own.device)
    if isinstance(own, DTensor):
        own.copy_(distribute_tensor(value, own.device_mesh, own.placements))
    else:
        broadcast(value)  # of mmengine, which moves it to a GPU and back if need be
        own.copy_(value)


def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU in the first process, nothing in others. All processes call it."""
    whole = {}
    for name in sorted(tensors):  # all processes in one order, whatever theirs is
        value = tensors[name]
        value = value.full_tensor() if is_sharded(value) else value
        if dist.get_rank() == 0:
            whole[name] = value.detach().cpu()
    return {name: whole[name] for name in tensors if name in whole}


def is_sharded(value: object) -> bool:
    """Whether a tensor is a piece of one that all processes share."""
    return isinstance(value, Tensor) and hasattr(value, 'full_tensor')


def bytes_held(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors in this process; of those that are shared, of its pieces."""
    return sum((value.to_local() if is_sharded(value) else value).nbytes for value in tensors)
