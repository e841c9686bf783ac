"""What a backbone costs, part by part: the calculations of `analyze_model.py`, whose text says what is counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

from torch import nn

from swinv2_mm import SwinTransformerV2
from swinv2_mm.backbone import PART_SIZE, Block
from swinv2_mm.ops import sdpa
from swinv2_mm.position_bias import CPB_HIDDEN_DIMS, POSITION_BIASES, ParameterizedPositionBias
from swinv2_mm.windows import WindowGroup, partition

FLOAT = 4  # bytes
ATTENTION_TILES = 10 * 2**20  # bytes, of ops/flash_cpu.py in the backward pass: five of its `WEIGHTS`
LOGSUMEXP_ROWS = 32  # queries to a multiple of which the memory-efficient kernel pads what it keeps of a softmax


class Training(NamedTuple):
    """How a step is computed: under bfloat16 autocast or in float32, on cuda or cpu, with checkpointing or without."""

    half: bool = False
    device: str = 'cuda'
    with_cp: bool = False

    @property
    def size(self) -> int:
        """Bytes of a value that a linear layer takes or gives."""
        return 2 if self.half else FLOAT


@dataclass(frozen=True)
class Cost:
    """What a part of the backbone costs.

    Attributes:
        parameters (int), trained (int): how many there are, and how many of them are not frozen.
        linear (int): multiply-adds of an image in linear layers and norms.
        attention (int): those of the products of attention, over the ragged windows.
        masked (int): the same if every window is whole, rolled and masked where it is shifted, as the official
            `flops()` counts.
        kept (int): bytes per image that stay for the backward pass.
        kept_once (int): the same whatever the batch.
        output (int): bytes of the map per image that the backbone returns.
    """

    parameters: int = 0
    trained: int = 0
    linear: int = 0
    attention: int = 0
    masked: int = 0
    kept: int = 0
    kept_once: int = 0
    output: int = 0

    @property
    def flops(self) -> int:
        return self.linear + self.attention

    def at(self, batch: int) -> int:
        """Bytes that stay for the backward pass of a batch."""
        return batch * self.kept + self.kept_once


class Row(NamedTuple):
    """A part of the backbone, its map in tokens, and the groups of windows of its even and of its odd blocks.

    ``working`` and ``working_once`` are bytes that the backward pass of its dearest block needs for a while, per image
    and whatever the batch.
    """

    name: str
    height: int
    width: int
    channels: int
    cost: Cost
    blocks: Sequence[Block] = ()
    groups: Sequence[Sequence[WindowGroup]] = ()
    window: int = 0
    working: int = 0
    working_once: int = 0


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
        backbone (SwinTransformerV2): may be on the meta device.
        size (tuple[int]): height and width of the image in pixels.
        training (Training): ``with_cp`` there counts, not that of the backbone.

    Raises:
        ValueError: the backbone drops attention weights or tokens, whose masks are in no formula here.
    """
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in backbone.modules()) or any(
        block.attn.attn_drop > 0 for stage in backbone.layers for block in stage.blocks
    ):
        raise ValueError('training memory is calculated without dropout: set drop_rate and attn_drop_rate to 0')
    height, width = (-(-side // backbone.patch_embed.patch_size) for side in size)
    channels = backbone.patch_embed.norm.weight.numel()
    rows = [Row('patch embed', height, width, channels, embedding_cost(backbone, height * width, training))]
    for i in range(len(backbone.layers)):
        rows.append(stage_row(backbone, i, height, width, training))
        height, width = -(-height // 2), -(-width // 2)
    return rows


def stage_row(backbone: SwinTransformerV2, i: int, height: int, width: int, training: Training) -> Row:
    """A stage whose map has height x width tokens, and the way down to the next one."""
    stage, tokens = backbone.layers[i], height * width
    channels = stage.blocks[0].norm1.weight.numel()
    shifts = (0, stage.window_size // 2)
    groups = [partition(1, height, width, stage.window_size, shift, 'meta').groups for shift in shifts]
    of_blocks = [(block, groups[j % 2]) for j, block in enumerate(stage.blocks)]
    whole = min(stage.window_size, height) * min(stage.window_size, width)
    row = Row(f'stage {i}', height, width, channels, counted(stage), stage.blocks, groups, stage.window_size)
    costs = [block_cost(block, of_block, whole, training) for block, of_block in of_blocks]
    if i in backbone.out_indices:
        norm = getattr(backbone, f'norm{i}')
        costs.append(counted(norm, tokens, kept=norm_kept(norm, tokens), output=FLOAT * tokens * channels))
    if i + 1 < len(backbone.layers):
        costs.append(merging_cost(stage.downsample, -(-height // 2) * -(-width // 2), training))
    else:
        costs.append(counted(stage.downsample))
    working = [block_working(block, of_block, training) for block, of_block in of_blocks]
    return row._replace(cost=total(costs), working=max(w for w, _ in working), working_once=max(w for _, w in working))


def embedding_cost(backbone: SwinTransformerV2, tokens: int, training: Training) -> Cost:
    """The patch embedding, which keeps the image, the input of its norm and its statistics."""
    embed = backbone.patch_embed
    kept = training.size * tokens * embed.proj.weight[0].numel() if trains(embed) else 0
    return counted(embed, tokens, kept=kept + norm_kept(embed.norm, tokens), kept_once=copies(training, embed.proj))


def merging_cost(merging: nn.Module, tokens: int, training: Training) -> Cost:
    """Patch merging to so many tokens, which keeps the four neighbours side by side, and what its norm keeps."""
    reduction = merging.reduction
    kept = training.size * tokens * reduction.in_features if trains(merging) else 0
    kept += norm_kept(merging.norm, tokens)
    return counted(merging, tokens, kept=kept, kept_once=copies(training, reduction))


def block_cost(block: Block, groups: Sequence[WindowGroup], whole: int, training: Training) -> Cost:
    """A block of some windows; ``whole`` is the tokens of a window that is not cut."""
    tokens, channels = num_tokens(groups), block.norm1.weight.numel()
    pairs = sum(group.num_tokens * group.height * group.width for group in groups)
    kept, kept_once = block_kept(block, groups, training)
    return counted(
        block,
        tokens,
        attention=2 * channels * pairs,  # q k^T, and the weights times v
        masked=2 * channels * tokens * whole,
        kept=kept,
        kept_once=kept_once,
    )


def counted(module: nn.Module, tokens: int = 0, **costs: int) -> Cost:
    """Costs with the parameters of a module, each weight of which takes one multiply-add a token."""
    parameters = list(module.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    linear = tokens * sum(
        p.numel()
        for name, p in module.named_parameters()
        if name.endswith('weight') and not set(name.split('.')) & {bias.name for bias in POSITION_BIASES.values()}
    )
    return Cost(sum(p.numel() for p in parameters), trained, linear, **costs)


def block_kept(block: Block, groups: Sequence[WindowGroup], training: Training) -> tuple[int, int]:
    """Bytes that a block keeps for the backward pass, per image and whatever the batch.

    In values of `Training.size` bytes, per token: the input of qkv (C channels), queries, keys and values (3C), the
    inputs of proj (C), of the MLP (C) and of its GELU (its hidden channels). In float32: the input of each norm (C) and
    two statistics, and a factor of each branch if it may be dropped. Attention adds what it keeps. Whatever the batch:
    what the position bias keeps, and the bfloat16 copies of weights.

    With activation checkpointing the input of the block is all that stays of them, in float32.

    Not counted: index tensors and coordinates, which are cached, a scale per head, and states of random generators.
    """
    if not trains(block):
        return 0, 0
    tokens, channels = num_tokens(groups), block.norm1.weight.numel()
    if training.with_cp:
        return FLOAT * tokens * channels, position_bias_kept(block, groups, keeps_table=True)
    computed, computed_once = attention_kept(block, groups, training) if training.device == 'cuda' else (0, 0)
    computed += training.size * tokens * (6 * channels + block.mlp.fc1.out_features)
    computed += sum(norm_kept(norm, tokens) for norm in (block.norm1, block.norm2, block.norm3))
    computed += 2 * FLOAT * tokens * (block.drop_path.drop_prob > 0)
    computed_once += copies(training, block.attn.qkv, block.attn.proj, block.mlp.fc1)
    bias = position_bias_kept(block, groups, keeps_table=training.device == 'cpu')
    return computed, computed_once + bias


def attention_kept(block: Block, groups: Sequence[WindowGroup], training: Training) -> tuple[int, int]:
    """Bytes that ops/sdpa.py keeps on CUDA beside ``qkv`` and what goes into proj, per image and whatever the batch.

    Per token the cosines' queries in float32 (C), what the kernel takes as queries and keys and gives for each group
    (3C), both norms, with and without a limit (4 per head), and the logarithms of its sums (1 per head); in bfloat16
    also queries and keys in float32 (2C). Whatever the batch: the bias of every pair in a window of each group.
    """
    tokens, channels, heads = num_tokens(groups), block.norm1.weight.numel(), block.attn.num_heads
    queries = sum(group.count * round_up(group.height * group.width, LOGSUMEXP_ROWS) for group in groups)
    kept = tokens * channels * (FLOAT + 3 * training.size + 2 * FLOAT * training.half)
    kept += FLOAT * heads * (4 * tokens + queries)
    return kept, sum(training.size * heads * pairs_of_bias(group) for group in groups)


def position_bias_kept(block: Block, groups: Sequence[WindowGroup], keeps_table: bool) -> int:
    """Bytes of the position MLP at every offset of the largest window: its hidden layer, its output, and the table."""
    if isinstance(block.attn.position_bias, ParameterizedPositionBias):
        return 0  # a view of the parameter
    height, width = (max(sides) for sides in zip(*(group[:2] for group in groups)))
    return FLOAT * (2 * height - 1) * (2 * width - 1) * (CPB_HIDDEN_DIMS + (1 + keeps_table) * block.attn.num_heads)


def block_working(block: Block, groups: Sequence[WindowGroup], training: Training) -> tuple[int, int]:
    """Bytes that the backward pass of a block needs for a while, per image and whatever the batch, at most.

    On cuda, beside the gradient of the map, the largest of: the gradients of the MLP's output and, twice, of its hidden
    layer; those of attention's output, queries, keys and values, with that of the bias of every window of a group; the
    same without the bias, in the normalisation of queries or keys. Before attention the MLP has freed what it kept. On
    cpu the map's gradient, twice in window order, and what a part of the map needs. With activation checkpointing also
    what the block keeps without it.
    """
    if not trains(block):
        return 0, 0
    tokens, channels = num_tokens(groups), block.norm1.weight.numel()
    hidden = block.mlp.fc1.out_features
    branch = training.size * tokens * channels
    mlp = branch + 2 * training.size * tokens * hidden
    recomputed = block_kept(block, groups, training._replace(with_cp=False)) if training.with_cp else (0, 0)
    if training.device == 'cpu':
        part = min(tokens, max(PART_SIZE // channels, *(group.height * group.width for group in groups)))
        of_part = part * (mlp + recomputed[0]) // tokens + ATTENTION_TILES
        return 3 * FLOAT * tokens * channels, of_part + recomputed[1]
    biases = (training.size * block.attn.num_heads * group.count * pairs_of_bias(group) for group in groups)
    product = 4 * branch + max(biases)
    normalisation = 3 * branch + 5 * FLOAT * channels * tokens
    freed = branch + training.size * tokens * hidden + norm_kept(block.norm2, tokens)
    attention = max(product, normalisation) - freed
    return FLOAT * tokens * channels + max(mlp, attention) + recomputed[0], recomputed[1]


def peak(rows: Sequence[Row], batch: int) -> Peak:
    """The memory of a training step of a batch, at most.

    Parameters take 16 bytes, with their gradient and AdamW's two moments, and 4 if they are frozen. The maps that the
    backbone returns and their gradients are held throughout. The backward pass frees what it has used, so that most is
    held where what is kept up to a stage and what its blocks need for a while are most.
    """
    cost = total(row.cost for row in rows)
    parameters = FLOAT * (cost.parameters + 3 * cost.trained)
    peaks = [
        Peak(
            row.name,
            parameters,
            2 * batch * cost.output,
            total(row.cost for row in rows[: i + 1]).at(batch),
            batch * row.working + row.working_once,
        )
        for i, row in enumerate(rows)
    ]
    return max(peaks, key=lambda peak: peak.total)


def largest_batch(rows: Sequence[Row], available: int) -> int:
    """The largest batch whose `peak` fits so many bytes; 0 if not even one image does."""
    fits, too_large = 0, available // total(row.cost for row in rows).output + 1
    while too_large - fits > 1:
        batch = (fits + too_large) // 2
        if peak(rows, batch).total <= available:
            fits = batch
        else:
            too_large = batch
    return fits


def norm_kept(norm: nn.Module, tokens: int) -> int:
    """Bytes that a LayerNorm keeps: its input in float32 and two statistics a token; 0 where there is none."""
    return FLOAT * tokens * (norm.weight.numel() + 2) if trains(norm) else 0


def copies(training: Training, *layers: nn.Module) -> int:
    """Bytes of the copies of weights in bfloat16 that autocast makes once for a step."""
    return sum(training.size * layer.weight.numel() for layer in layers if trains(layer)) if training.half else 0


def trains(module: nn.Module) -> bool:
    """Whether it has parameters that are not frozen."""
    return any(p.requires_grad for p in module.parameters())


def num_tokens(groups: Sequence[WindowGroup]) -> int:
    return sum(group.num_tokens for group in groups)


def pairs_of_bias(group: WindowGroup) -> int:
    """Values of a head's bias as the memory-efficient kernel takes it, for one window."""
    num_tokens = group.height * group.width
    return num_tokens * round_up(num_tokens, sdpa.ALIGNMENT)


def round_up(value: int, multiple: int) -> int:
    return value + -value % multiple
