"""Stores as xarray datasets with named dimensions: `xarray.open_dataset("out.zarr", engine="teal", level=0.5)`.

A level becomes a dataset: the four sites and the seven projections as lazy variables [layer, token,
<site>_channel], the thresholds, and the token columns as coordinates. `open_datatree` gives every level as a
group. Needs the extra `teal-cli[xarray]`; how blocks are read is the business of `arrays`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from xarray import Dataset, DataTree, Variable
from xarray.backends import BackendArray, BackendEntrypoint
from xarray.core import indexing

from teal_cli.errors import UsageError
from teal_cli.store.arrays import ActivationArray
from teal_cli.store.metadata import schema_of
from teal_cli.store.reader import ActivationStore, Level, open_store
from teal_cli.store.remote import place_of
from teal_cli.store.schema import PHASES, SCHEMAS
from teal_kernels.spec import PROJECTION_SITE, PROJECTIONS, SITES


class TealBackendEntrypoint(BackendEntrypoint):
    """The engine `teal`."""

    description = "Sparse activations collected by teal"
    url = "https://arxiv.org/abs/2408.14690"
    open_dataset_parameters = ("filename_or_obj", "drop_variables", "level")
    supports_groups = True

    def open_dataset(
        self,
        filename_or_obj: Any,
        *,
        drop_variables: str | Iterable[str] | None = None,
        level: str | float | None = None,
    ) -> Dataset:
        """One level of a store.

        Args:
            filename_or_obj: the store's folder.
            drop_variables: names to leave out.
            level: name or target; may be left out where the store has only one.

        Raises:
            UsageError: no level given and there are several; not a teal store.
            NotFoundError: no such store or level.
        """
        store = open_store(os.fspath(filename_or_obj))
        if level is None and len(store.levels) != 1:
            raise UsageError(
                f"{store.path} has {len(store.levels)} levels",
                hint=f"give level=..., one of {', '.join(store.levels)}, or use open_datatree",
            )
        chosen = store.level(store.levels[0] if level is None else level)
        return _dataset(store, chosen).drop_vars(_names(drop_variables), errors="ignore")

    def open_groups_as_dict(
        self, filename_or_obj: Any, *, drop_variables: str | Iterable[str] | None = None, **_: Any
    ) -> dict[str, Dataset]:
        """Every level of a store, by its name; attributes of the store on the root."""
        store = open_store(os.fspath(filename_or_obj))
        dropped = _names(drop_variables)
        groups = {"/": Dataset(attrs=_attributes(store.attrs))}
        for name in store.levels:
            groups[f"/{name}"] = _dataset(store, store.level(name)).drop_vars(dropped, errors="ignore")
        return groups

    def open_datatree(
        self, filename_or_obj: Any, *, drop_variables: str | Iterable[str] | None = None, **kwargs: Any
    ) -> DataTree:
        """`open_groups_as_dict` as a tree."""
        return DataTree.from_dict(self.open_groups_as_dict(filename_or_obj, drop_variables=drop_variables, **kwargs))

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        """Whether the folder is a store of this schema."""
        if not isinstance(filename_or_obj, str | os.PathLike):
            return False
        return schema_of(place_of(filename_or_obj)) in SCHEMAS


class _LayeredArray(BackendArray):
    """One variable [layer, token, channel]; xarray indexes it lazily."""

    def __init__(self, layers: list[ActivationArray]) -> None:
        self._layers = layers
        self.shape = (len(layers), *layers[0].shape)
        self.dtype = layers[0].dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._outer)

    def _outer(self, key: tuple[Any, ...]) -> np.ndarray:
        layer, token, channel = key
        if isinstance(layer, int | np.integer):
            return self._rows(self._layers[layer], token, channel)
        chosen = np.arange(len(self._layers))[layer]
        rows = [self._rows(self._layers[index], token, channel) for index in chosen]
        if rows:
            return np.stack(rows)
        return np.empty((0, *self._rows(self._layers[0], slice(0, 0), channel).shape), self.dtype)

    @staticmethod
    def _rows(array: ActivationArray, token: Any, channel: Any) -> np.ndarray:
        rows: np.ndarray = array[token][..., channel]
        return rows


def _dataset(store: ActivationStore, level: Level) -> Dataset:
    layers = range(store.header.layers)
    variables: dict[str, Variable] = {}
    for site in SITES:
        variables[site] = _variable([level.site(layer, site) for layer in layers], site)
    for name in PROJECTIONS:
        variables[name] = _variable([level.projection(layer, name) for layer in layers], PROJECTION_SITE[name])
    variables["thresholds"] = Variable(("layer", "projection"), level.thresholds)
    if level.expert_thresholds is not None:
        variables["expert"] = Variable(("layer", "token", "place"), np.stack(list(map(level.stored_experts, layers))))
        variables["expert_thresholds"] = Variable(("layer", "expert_number"), level.expert_thresholds)
    coordinates = {name: Variable(("token",), level.tokens[name]) for name in store.header.token_columns}
    coordinates["phase"].attrs = {"flag_values": list(PHASES.values()), "flag_meanings": " ".join(PHASES)}
    coordinates["projection"] = Variable(("projection",), np.array(PROJECTIONS))
    attributes = _attributes(store.attrs) | {
        "level": level.name,
        "target": level.target,
        "allocation": level.allocation,
        "level_complete": level.complete,
    }
    return Dataset(variables, coords=coordinates, attrs=attributes)


def _variable(layers: list[ActivationArray], site: str) -> Variable:
    data = indexing.LazilyIndexedArray(_LayeredArray(layers))
    return Variable(("layer", "token", f"{site}_channel"), data, attrs={"site": site})


def _attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of the store without its prompts, which can be long."""
    return {name: value for name, value in attributes.items() if name != "prompts"}


def _names(names: str | Iterable[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())
