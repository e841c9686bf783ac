"""What a backbone costs, part by part: parameters and FLOPs by calculation, memory by a step on fake tensors."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swinv2_mm import SwinTransformerV2, compat, ops
from swinv2_mm.position_bias import POSITION_BIASES
from swinv2_mm.windows import WindowGroup, partition

FLOAT = 4  # bytes
BATCH = 1_000_003  # a prime: tensors whose bytes are a multiple of it grow with the batch, others do not
GAP = 64  # bytes by which such a tensor may be smaller, if kernels pad all of its rows but the last
KERNELS = {'swinv2_mm::map_attention_backward': 6}  # of an operator, where there are more than one
CPU_TEMPORARIES = 10 * 2**20  # bytes that backward of ops/flash_cpu.py holds for a while and no operator returns


class Training(NamedTuple):
    """How a step is computed: in bfloat16 autocast or float32, on cuda or cpu, with or without checkpointing."""

    half: bool = False
    device: str = 'cuda'
    with_cp: bool = False


@dataclass(frozen=True)
class Cost:
    """What a part of the backbone costs.

    Attributes:
        parameters (int), trained (int): how many there are, and how many of them are not frozen.
        linear (int): multiply-adds per image in linear layers and norms.
        attention (int): those of the products of attention, over the ragged windows.
        masked (int): the same if every window is whole, rolled and masked where it is shifted, as the official
            `flops()` counts.
        kept (int), kept_once (int): bytes that stay for the backward pass, per image and independent of the batch.
        output (int): bytes per image of the map that the backbone returns.
        kernels (int): operators of a training step that compute something, each of which launches a kernel or a few.
    """

    parameters: int = 0
    trained: int = 0
    linear: int = 0
    attention: int = 0
    masked: int = 0
    kept: int = 0
    kept_once: int = 0
    output: int = 0
    kernels: int = 0

    @property
    def flops(self) -> int:
        return self.linear + self.attention

    def at(self, batch: int) -> int:
        """Bytes that stay for the backward pass of a batch."""
        return batch * self.kept + self.kept_once


class Row(NamedTuple):
    """A part of the backbone, its map in tokens, and the groups of windows of its even and of its odd blocks.

    ``held`` and ``held_once`` are the most bytes in use while the step is in this part, without parameters and their
    gradients, per image and independent of the batch.
    """

    name: str
    height: int
    width: int
    channels: int
    cost: Cost
    held: int
    held_once: int
    depth: int = 0
    heads: int = 0
    window: int = 0
    groups: Sequence[Sequence[WindowGroup]] = ()


class Peak(NamedTuple):
    """Bytes of a training step of a batch, where it holds most: in the backward pass of ``stage``."""

    stage: str
    parameters: int
    outputs: int
    kept: int
    working: int

    @property
    def total(self) -> int:
        return self.parameters + self.outputs + self.kept + self.working


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of costs."""
    return Cost(*(sum(values) for values in zip(*map(astuple, [Cost(), *costs]))))


def analyze(backbone: SwinTransformerV2, size: tuple[int, int], training: Training) -> list[Row]:
    """What the patch embedding and every stage cost.

    Args:
        backbone (SwinTransformerV2): may be on the meta device, and stays as it is.
        size (tuple[int]): height and width of the image in pixels.
        training (Training): ``with_cp`` there counts, not that of the backbone.
    """
    kept, held, kernels = measure(backbone, size, training)
    embed, channels = backbone.patch_embed, backbone.arch.embed_dims
    height, width = (-(-side // embed.patch_size) for side in size)
    rows = [Row('patch embed', height, width, channels, counted(embed, height * width), *held[0])]
    for i in range(len(backbone.layers)):
        rows.append(stage_row(backbone, i, height, width, held[i + 1]))
        height, width = -(-height // 2), -(-width // 2)
    measured = [Cost(kept=k, kept_once=o, kernels=n) for (k, o), n in zip(kept, kernels)]
    return [row._replace(cost=total([row.cost, cost])) for row, cost in zip(rows, measured)]


def stage_row(backbone: SwinTransformerV2, i: int, height: int, width: int, held: Sequence[int]) -> Row:
    """A stage whose map has height x width tokens, its output norm, and the downsampling layer."""
    stage, channels, tokens = backbone.layers[i], backbone.arch.embed_dims * 2**i, height * width
    window, depth = stage.window_size, len(stage.blocks)
    groups = [partition(1, height, width, window, shift, 'meta').groups for shift in (0, window // 2)[:depth]]
    pairs = sum(group.num_tokens * group.height * group.width for j in range(depth) for group in groups[j % 2])
    whole = depth * tokens * min(window, height) * min(window, width)
    costs = [
        Cost(attention=2 * channels * pairs, masked=2 * channels * whole),  # q k^T, and the weights times v
        counted(stage.blocks, tokens),
        counted(stage.downsample, -(-height // 2) * -(-width // 2)),
    ]
    if i in backbone.out_indices:
        costs += [counted(getattr(backbone, f'norm{i}'), tokens), Cost(output=FLOAT * tokens * channels)]
    heads = backbone.arch.num_heads[i]
    return Row(f'stage {i}', height, width, channels, total(costs), *held, depth, heads, window, groups)


def counted(module: nn.Module, tokens: int) -> Cost:
    """The cost of a module in which each weight takes one multiply-add per token."""
    parameters = dict(module.named_parameters())
    biases = {bias.name for bias in POSITION_BIASES.values()}
    weights = [p for name, p in parameters.items() if name.endswith('weight') and not biases & {*name.split('.')}]
    numbers = ([p for p in parameters.values() if p.requires_grad], weights)
    trained, linear = (sum(p.numel() for p in some) for some in numbers)
    return Cost(sum(p.numel() for p in parameters.values()), trained, tokens * linear)


def peak(rows: Sequence[Row], batch: int) -> Peak:
    """The memory of a training step of a batch, at most.

    Parameters take 16 bytes, with their gradient and AdamW's two moments, and 4 if they are frozen. The maps that the
    backbone returns and their gradients are held throughout. The backward pass frees what it has used.
    """
    cost = total(row.cost for row in rows)
    parameters, outputs = FLOAT * (cost.parameters + 3 * cost.trained), 2 * batch * cost.output
    held = [batch * row.held + row.held_once for row in rows]
    most = held.index(max(held))
    kept = total(row.cost for row in rows[: most + 1]).at(batch)
    return Peak(rows[most].name, parameters, outputs, kept, held[most] - kept - outputs)


def largest_batch(rows: Sequence[Row], available: int) -> int:
    """The largest batch whose `peak` fits so many bytes; 0 if not even one image does."""
    available -= peak(rows, 0).parameters
    return max(0, min((available - row.held_once) // row.held for row in rows))


def measure(backbone: SwinTransformerV2, size: tuple[int, int], training: Training) -> tuple[list, list, list]:
    """What the patch embedding and each stage keep for the backward pass, the most that is in use in each, and kernels.

    Returns:
        tuple: of the first two, for each part, the bytes per image and those independent of the batch; of the last, a
        number for each part.
    """
    if training.device == 'cuda':
        memory, kernels = run_step(backbone, size, training, BATCH)
        return *memory.tolist(), kernels
    compat.require((2, 4), '--device cpu')  # older ones can't run the operators of ops/flash_cpu.py on fake tensors
    # Blocks compute the map in parts, which do not grow with the batch.
    (one, kernels), (two, _) = (run_step(backbone, size, training, batch) for batch in (1, 2))
    both = np.stack([(two - one)[..., 0], (2 * one - two)[..., 0]], -1)
    both[1, :, 1] += CPU_TEMPORARIES
    return *both.tolist(), kernels


def run_step(
    backbone: SwinTransformerV2, size: tuple[int, int], training: Training, batch: int
) -> tuple[np.ndarray, list[int]]:
    """Run a training step on fake tensors, which have shapes and no memory.

    Returns:
        tuple: the memory, (2, parts, 2), and the kernels, as of `measure`.
    """
    on_cuda = training.device == 'cuda'
    model = copy.deepcopy(backbone).train()
    for stage in model.layers:
        stage.with_cp = training.with_cp
    with FakeTensorMode(), paths_of_cuda() if on_cuda else contextlib.nullcontext():
        make_fake(model)
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        held = Held([model.patch_embed, *model.layers], [*model.parameters(), *gradients], batch if on_cuda else 1)
        with held:
            image = torch.empty(batch, model.patch_embed.proj.in_channels, *size)
            with torch.autocast('cpu', torch.bfloat16, enabled=training.half):
                maps = model(image)
            kept = held.by_part()
            trained = [x for x in maps if x.requires_grad]
            if trained:
                torch.autograd.backward(trained, [torch.ones_like(x) for x in trained])
    for part, x in zip((0, *(i + 1 for i in backbone.out_indices)), (image, *maps)):
        kept[part] -= held.split(x.nbytes)
    return np.stack([kept, held.most]), held.kernels


def make_fake(model: nn.Module) -> None:
    """Give a model fake parameters, with gradients, and fake buffers; within a `FakeTensorMode`."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            fake = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
            fake.grad = torch.empty_like(fake) if p.requires_grad else None
            setattr(module, name, fake)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


class Held(TorchDispatchMode):
    """The bytes of the tensors that operators make, for as long as they live.

    All numbers are pairs, as of `split`.

    Args:
        parts (Sequence[nn.Module]): parts of a model, which the step enters one after the other.
        known (Sequence[Tensor]): tensors that do not count.
        divisor (int): what divides the bytes of tensors that grow with the batch.

    Attributes:
        most (ndarray): (parts, 2), the most that was held while the step was in each part, forward or backward.
        kernels (list[int]): of each part, without those that add up gradients and allocate.
    """

    def __init__(self, parts: Sequence[nn.Module], known: Sequence[Tensor], divisor: int):
        super().__init__()
        self.known, self.divisor = {x.untyped_storage()._cdata for x in known}, divisor
        self.live = {}  # the part that made a storage, and its bytes
        self.part, self.now, self.most = 0, np.zeros(2, int), np.zeros((len(parts), 2), int)
        self.kernels = [0] * len(parts)
        for i, part in enumerate(parts):
            part.register_forward_pre_hook(lambda module, inputs, i=i: setattr(self, 'part', i))
            part.register_forward_hook(lambda module, inputs, out, i=i: self._leave(i, out))

    def _leave(self, part, out):
        if out.requires_grad:
            out.register_hook(lambda grad: setattr(self, 'part', part))

    def split(self, size: int) -> np.ndarray:
        """Bytes per image, and bytes independent of the batch."""
        grows = -size % self.divisor <= GAP
        return np.array([-(-size // self.divisor), 0] if grows else [0, size])

    def by_part(self) -> np.ndarray:
        """What is held, (parts, 2), by the part that made it."""
        held = np.zeros_like(self.most)
        for part, size in self.live.values():
            held[part] += size
        return held

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)]
        made = [storage for storage in made if storage._cdata not in {*self.known, *self.live}]
        self._count(function, args, made)
        for storage in made:
            if storage._cdata not in self.live:
                size = self.split(storage.nbytes())
                self.live[storage._cdata] = self.part, size
                self.now += size
                weakref.finalize(storage, self._drop, storage._cdata)
        self.most[self.part] = np.maximum(self.most[self.part], self.now + self._temporary(function, args))
        return out

    def _count(self, function, args, made):
        if function._schema.is_mutable:
            computes = not isinstance(args[0], Tensor) or args[0].untyped_storage()._cdata not in self.known
        else:
            computes = made and 'empty' not in function.name()
        self.kernels[self.part] += KERNELS.get(function.name(), 1) if computes else 0

    def _temporary(self, function, args):
        """What an operator of ours holds for a while and does not return."""
        if function.name() != 'swinv2_mm::map_attention_backward':
            return 0
        _, qkv, _, table, _, lse, window, shift = args
        return self.split(lse.nbytes) + np.array([0, ops.flash_cuda.scratch_bytes(qkv, table, window, shift)])

    def _drop(self, key):
        self.now -= self.live.pop(key)[1]


@contextlib.contextmanager
def paths_of_cuda() -> Iterator[None]:
    """Make fake tensors on the CPU take the paths of tensors on CUDA, of which PyTorch without CUDA has none."""
    patches = [
        mock.patch.object(ops.flash_cuda, 'DEVICE', 'cpu'),
        mock.patch.object(ops.flash_cuda, 'unable_on', lambda *args: None),
        mock.patch.object(ops.flash_cpu, 'unable', lambda *args: 'is for CPU'),
        mock.patch.object(F, 'scaled_dot_product_attention', efficient_attention),
        mock.patch('swinv2_mm.backbone.runs_in_parts', lambda x: False),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, scale: float) -> Tensor:
    """The operator that `scaled_dot_product_attention` calls on CUDA, with the bias of every window in aligned rows."""
    num_keys = attn_mask.shape[3]
    bias = F.pad(attn_mask, (0, -num_keys % ops.sdpa.ALIGNMENT))[..., :num_keys].expand(*q.shape[:2], -1, -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=scale)[0]
