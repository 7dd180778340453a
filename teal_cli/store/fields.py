"""Fields of what a store says about itself, checked one by one, and the object that tells of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from teal_cli.store.schema import NO_EXPERT


def take(found: Mapping[str, Any], name: str, kind: type | tuple[type, ...], *, optional: bool = False) -> Any:
    """A field of a JSON object.

    Raises:
        ValueError: it is missing or of another type (a bool is no number).
    """
    if name not in found:
        raise ValueError(f"{name} is missing")
    value = found[name]
    if optional and value is None:
        return value
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} is {str(value)[:40]!r}, which is of the wrong type")
    return value


def items(found: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    """A field that is a list of one type; raises as `take`."""
    values = take(found, name, list)
    if not all(isinstance(value, kind) and not isinstance(value, bool) for value in values):
        raise ValueError(f"{name} has an entry of the wrong type")
    return list(values)


def flags(found: Mapping[str, Any], name: str) -> list[bool]:
    """A field that is a list of true and false; raises as `take`."""
    values = take(found, name, list)
    if not all(isinstance(value, bool) for value in values):
        raise ValueError(f"{name} has an entry of the wrong type")
    return list(values)


@dataclass(frozen=True)
class StoredMixture:
    """The experts of a store's model.

    Attributes:
        experts: of a layer.
        routed: how many of them a token passes.
        layers: bool [layers], which layers have experts.
    """

    experts: int
    routed: int
    layers: tuple[bool, ...]

    def check(self, layers: int, channels: int) -> None:
        """Raises ValueError where the numbers do not fit each other, or a model of so many layers and channels."""
        if not 1 <= self.routed <= self.experts < NO_EXPERT or channels % self.routed or len(self.layers) != layers:
            raise ValueError(f"mixture is {self}, which does not fit {layers} layers of {channels} channels")

    @classmethod
    def from_attributes(cls, found: Any) -> StoredMixture:
        """Raises ValueError as `take`."""
        if not isinstance(found, dict):
            raise ValueError("mixture is of the wrong type")
        return cls(take(found, "experts", int), take(found, "routed", int), tuple(flags(found, "layers")))
