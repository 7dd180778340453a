"""What exports take from a store's model: the weight rows that kept channels read, layer by layer, and widths."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from teal_cli.errors import NotFoundError, UsageError
from teal_cli.registry.registry import Registry
from teal_cli.store.part import Part
from teal_cli.store.reader import ActivationStore
from teal_kernels.spec import PROJECTIONS, SITE_PROJECTIONS

if TYPE_CHECKING:
    from teal_cli.model.weights import Checkpoint, LayerWeights


def open_checkpoint(store: ActivationStore, path: Path) -> Checkpoint:
    """The checkpoint of the model that wrote a store.

    Raises:
        UsageError: its config.json is not that of the store's model, or its matrices are quantised.
        NotFoundError, TealError: as `Checkpoint`.
    """
    from teal_cli.model.config import refuse_mixture
    from teal_cli.model.weights import Checkpoint, config_sha256

    checkpoint = Checkpoint(path)
    refuse_mixture(checkpoint.config, "the export of weights", "convert without weights")
    if config_sha256(path) != store.header.config_sha256:
        raise UsageError(f"{path} is not the model that wrote {store.path}", hint="convert without weights")
    if checkpoint.quantization is not None:
        raise UsageError(f"the matrices in {path} are quantised, and have no rows of numbers", hint="name its parent")
    return checkpoint


def model_outputs(store: ActivationStore, registry: Registry) -> dict[str, int]:
    """How wide the output of each projection of the store's model is; empty where the registry does not have it."""
    from teal_cli.model.config import load_config
    from teal_cli.model.weights import config_sha256

    try:
        path = registry.get(store.header.model).path
    except NotFoundError:
        return {}
    if config_sha256(path) != store.header.config_sha256:
        return {}
    return dict(zip(PROJECTIONS, load_config(path).outputs(), strict=True))


def layer_weights(checkpoint: Checkpoint, layer: int, store: ActivationStore) -> LayerWeights:
    """The weights of a layer in the data type that the store's model computed in."""
    import torch

    return checkpoint.layer(layer, getattr(torch, store.header.dtype))


def write_weights(part: Part, weights: LayerWeights, folder: Path) -> Path:
    """`weights/<level>/layer_<n>/<name>.safetensors`: `channels` int64 [C], ascending, those that any selected row
    kept, and `weight` [C, N], row c what channel c is multiplied by; of a site the columns of all its projections.
    """
    import torch
    from safetensors.torch import save_file

    kept = np.zeros(part.shape[1], bool)
    for _, block in part.blocks():
        kept |= block.kept.any(axis=0)
    matrix = weights.matrix(part.site)
    group = SITE_PROJECTIONS[part.site]
    columns = dict(zip(group, matrix.data.split(matrix.segments, dim=1), strict=True)).get(part.name, matrix.data)
    channels = torch.from_numpy(np.flatnonzero(kept))
    path = part.file(folder / "weights", ".safetensors")
    save_file({"channels": channels, "weight": columns[channels].contiguous()}, path, part.words())
    return path
