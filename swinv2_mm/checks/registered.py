"""What the ``type`` of a config names, and which names are registered."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping

import mmengine.registry
from mmengine.registry import MODELS, DefaultScope, Registry

REGISTRIES = [registry for registry in vars(mmengine.registry).values() if isinstance(registry, Registry)]


def find(registry: Registry, kind: object) -> Callable | None:
    """The class or function of a ``type`` in the current scope, as `Registry.build` finds it; None if there is none."""
    if not isinstance(kind, str):
        return kind if callable(kind) else None
    scope = DefaultScope.get_current_instance()
    child = registry.children.get(scope.scope_name) if scope else None
    try:
        return (registry if child is None else child).get(kind)
    except Exception:  # its scope is not installed or does not import
        return None


def builds(node: Mapping, base: type) -> bool:
    """Whether a dict of a model's config builds a class, or one derived from it, however its ``type`` names that."""
    kind = find(MODELS, node.get('type'))
    return isinstance(kind, type) and issubclass(kind, base)


def class_name(kind: object) -> str:
    """The name of the class that a ``type`` names: by text, also of a module or a scope, or by itself."""
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2]


def registries_of(kind: object) -> list[Registry]:
    """The registries that know a ``type`` by its name."""
    return [registry for registry in REGISTRIES if isinstance(kind, str) and find(registry, kind) is not None]


def names(registry: Registry) -> Iterator[str]:
    """All names in a registry and those of the hosts below it."""
    yield from registry.module_dict
    for child in registry.children.values():
        yield from names(child)


def nearest(name: object, known: Iterable[object], cutoff: float = 0.6) -> str | None:
    """The known name most like another, ignoring case; None if none is like it."""
    by_lower = {str(one).lower(): str(one) for one in known}
    found = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """The cure for a wrong name, as the end of a message; empty if no known name is like it."""
    other = nearest(name, known)
    return f': did you mean {other!r}?' if other else ''
