"""What sharded training holds and sends: memory and bytes of every process, by calculation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from swinv2_mm import SwinTransformerV2
from swinv2_mm.engine.sharding import units
from swinv2_tools.model_costs import FLOAT, Row, total

COPIES = 5  # of a unit: parameters of it and of the next, the buffer that gathers, its gradient, the one that scatters
STATES = 3  # a gradient and AdamW's two moments, for each trained parameter


class Unit(NamedTuple):
    """What a process holds and sends of the parameters that are gathered together, in bytes."""

    stage: int  # of the backbone; -1 for the rest of it
    shard: int  # its piece of the parameters, gradients and AdamW's moments
    whole: int  # all parameters, gathered
    sent: int  # in a training step


class Share(NamedTuple):
    """What one of several processes holds of a training step, and sends in it, in bytes."""

    batch: int  # the largest that fits, per process
    shards: int
    gathered: int
    activations: int
    sent: int

    @property
    def total(self) -> int:
        return self.shards + self.gathered + self.activations


def list_units(backbone: SwinTransformerV2, processes: int) -> list[Unit]:
    """The units of a backbone, as `sharding.units` gives them, the rest of it last."""
    modules, own = list(units(backbone)), set()
    stages = {id(module): i for i, stage in enumerate(backbone.layers) for module in stage.modules()}
    found = []
    for module in modules:
        parameters = [p for p in module.parameters() if id(p) not in own]
        own |= set(map(id, parameters))
        found.append(_unit(stages.get(id(module), -1), parameters, processes))
    return found


def _unit(stage: int, parameters: Sequence[nn.Parameter], processes: int) -> Unit:
    # Each is cut along its first dimension into pieces of equal size, the last of which are padded.
    pieces = [-(-p.shape[0] // processes) * p[0].numel() * FLOAT for p in parameters]
    trained = [piece for piece, p in zip(pieces, parameters) if p.requires_grad]
    # Gathered before forward and, but for the rest of the backbone, again before backward; gradients are summed once.
    # Each process sends its piece to every other, or a piece of its gradient.
    gathers = 2 if trained and stage >= 0 else 1
    sent = (processes - 1) * (gathers * sum(pieces) + sum(trained))
    return Unit(stage, sum(pieces) + STATES * sum(trained), processes * sum(pieces), sent)


def share(backbone: SwinTransformerV2, rows: Sequence[Row], processes: int, available: int) -> Share:
    """The largest batch of each process, and what it then holds and sends.

    Args:
        backbone (SwinTransformerV2): may be on the meta device.
        rows (Sequence[Row]): of `analyze`.
        processes (int): among how many it is sharded.
        available (int): bytes of memory of each.

    Returns:
        Share: of a batch of 0 if not even one image fits; then memory is that of one image.
    """
    cut = list_units(backbone, processes)
    shards, rest = sum(unit.shard for unit in cut), 2 * cut[-1].whole  # which stays, and its gradient
    gathered = [
        rest + COPIES * max((u.whole for u in cut if u.stage == i), default=0) for i in range(-1, len(rows) - 1)
    ]
    rooms = [(available - shards - more - row.held_once) // row.held for row, more in zip(rows, gathered)]
    batch = max(0, min(rooms))
    held = [(max(batch, 1) * row.held + row.held_once, more) for row, more in zip(rows, gathered)]
    activations, more = max(held, key=sum)
    return Share(batch, shards, more, activations, sum(unit.sent for unit in cut))


def multiply_adds(rows: Sequence[Row], with_cp: bool) -> int:
    """Multiply-adds of a training step per image: backward takes twice those of forward, checkpointing one more."""
    return (4 if with_cp else 3) * total(row.cost for row in rows).flops
