"""Settings that are kept beside results, so that results of other settings are never added to them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from swinv2_mm.writing import whole


def keep(settings: Mapping, path: Path, free: Sequence[str] = ()) -> None:
    """Write settings to a JSON file, or compare them with those that it has.

    Args:
        settings (Mapping): values that JSON can hold, by name.
        path (Path): the file.
        free (Sequence[str]): names whose values may change.

    Raises:
        ValueError: the file has another value.
    """
    given = json.loads(json.dumps(settings))
    kept = json.loads(path.read_text()) if path.exists() else given
    for name, value in given.items():
        if name not in free and kept.get(name) != value:
            raise ValueError(f'{path.parent} was begun with {name} {kept.get(name)}, not {value}: name another --out')
    with whole(path) as partial:
        partial.write_text(json.dumps(given, indent=1) + '\n')
