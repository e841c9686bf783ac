"""What loading a checkpoint did, as a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..messages import printable


class LoadReport(NamedTuple):
    """What `load_pretrained` did with a checkpoint. As a string, a small table.

    Window sizes are per stage, in tokens. Those of the checkpoint are None if nothing says them.
    """

    source: str  # the path or URL
    format: str  # the name of one of swinv2_mm.checkpoints.formats.FORMATS, such as official or timm
    place: str  # where in the checkpoint the weights were, e.g. state_dict/backbone.
    loaded: tuple[str, ...]  # names in the backbone whose values are those of one tensor of the file
    converted: dict[str, str]  # names in the backbone whose values were rearranged: how
    left_out: dict[str, str]  # names in the file that the backbone does not get: why
    initial: dict[str, str]  # names in the backbone that stay at their initial value: why
    checkpoint_window_size: tuple[int, ...] | None
    window_size: tuple[int, ...]  # of the backbone
    checkpoint_pretrained_window_sizes: tuple[int, ...] | None
    pretrained_window_sizes: tuple[int, ...]  # of the backbone
    origin: str  # what says the pretrained windows; empty if nothing does

    def __str__(self):
        stages = range(len(self.window_size))
        rows = [('', *(f'stage {i}' for i in stages), '')]
        for title, before, after, remark in (
            ('window', self.checkpoint_window_size, self.window_size, ''),
            ('pretrained window', self.checkpoint_pretrained_window_sizes, self.pretrained_window_sizes, self.origin),
        ):
            before = before or ('?',) * len(stages)
            rows.append((title, *(f'{old} -> {new}' for old, new in zip(before, after)), remark))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        place = f', found at {self.place}' if self.place else ''
        lines += describe_tensors(self, widths[0])
        lines = [f'Loaded {self.source} (format: {self.format}{place})', *(f'  {line}' for line in lines)]
        return '\n'.join(map(printable, lines))


def describe_tensors(report: NamedTuple, width: int) -> list[str]:
    """A line for each of the loaded, converted, left out and initial tensors of a report.

    Args:
        report (NamedTuple): a `LoadReport`, or another report with fields of these names.
        width (int): characters of the first column.
    """
    fields = {
        'loaded': report.loaded,
        'converted': report.converted,
        'left out': report.left_out,
        'initial': report.initial,
    }
    return [f'{title.ljust(width)}  {count_by_reason(names)}' for title, names in fields.items()]


def count_by_reason(names: Mapping[str, str] | Sequence[str]) -> str:
    """`4 tensors: 2 classifier (head.weight, ...), 2 ...` for names with reasons, just the number without."""
    if not isinstance(names, Mapping) or not names:
        return f'{len(names)} tensors'
    reasons = []
    for reason, number in Counter(names.values()).items():
        first = next(name for name in names if names[name] == reason)
        reasons.append(f'{number} {reason} ({first}{", ..." if number > 1 else ""})')
    return f'{len(names)} tensors: {"; ".join(reasons)}'


def first_of(names: Sequence[str]) -> str:
    """The first of several names, and how many more there are."""
    return names[0] if len(names) == 1 else f'{names[0]} and {len(names) - 1} more'
