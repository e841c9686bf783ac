"""Data parallel training gives the gradients of one process on the joined batch."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import swinv2_mm.backbone
from swinv2_mm import SwinTransformerV2


def build():
    torch.manual_seed(0)
    backbone = SwinTransformerV2(
        arch=dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8)),
        window_size=4,
        drop_path_rate=0.0,
        with_cp=True,
    ).double()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return backbone


def loss(outs):
    return sum((out * torch.linspace(-1, 1, out[0].numel()).view_as(out[0])).mean() for out in outs)


def images():
    return torch.randn(4, 3, 72, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def train_on_half(rank, folder):
    torch.set_num_threads(1)
    swinv2_mm.backbone.PART_SIZE = 600  # several parts a block
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    backbone = build()
    parallel = DistributedDataParallel(backbone)  # must outlive the backward pass
    loss(parallel(images()[2 * rank : 2 * rank + 2])).backward()
    if rank == 1:
        torch.save({name: parameter.grad for name, parameter in backbone.named_parameters()}, folder / 'gradients.pth')
    dist.barrier()
    os._exit(
        0
    )  # gloo can deadlock where it is torn down: its thread waits for the interpreter, and that for the thread


def test_two_processes_give_the_gradients_of_the_joined_batch(tmp_path):
    mp.spawn(train_on_half, (tmp_path,), nprocs=2)
    backbone = build()
    loss(backbone(images())).backward()
    gradients = torch.load(tmp_path / 'gradients.pth')
    for name, parameter in backbone.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-13)
