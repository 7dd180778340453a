"""A checkpoint's tensors, read straight from safetensors into the layout that teal computes with.

A layer is allocated in its final form, and every tensor is cast and transposed out of the mapped file into its place,
so that no tensor, let alone a model, is held twice. This module does not know where checkpoints come from
(`registry` does) nor how they are multiplied.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.files import read_json
from teal_cli.model.config import ModelConfig, load_config
from teal_cli.model.families import FAMILIES, TOP
from teal_cli.model.fp8 import SCALE_DTYPES, SCALES, Fp8, fp8_of, scale_name
from teal_cli.model.fp8 import STORED as FP8
from teal_cli.model.parts import of_one_expert, parts_of
from teal_cli.model.quantized import Quantization, packed_name, packed_table, quantization_of
from teal_cli.model.rope import head_order
from teal_kernels.matrix import FloatMatrix, Matrix
from teal_kernels.packed import PackedMatrix
from teal_kernels.packing import RowLayout
from teal_kernels.spec import SITE_PROJECTIONS
from teal_kernels.steps.spec import MATRICES

Device: TypeAlias = torch.device | str

_TURNED_ROWS = 256
_INDEX = "model.safetensors.index.json"
_LAYERS: Final = "model.layers."
_STORED: Final = ("BF16", "F16", "F32")
_PACKED: Final = ("U8",)
_HINT = "check the files with `teal models verify NAME`, or fetch them again with `teal download --force`"
_EMBEDDING, _NORM, _HEAD = (TOP[part][0] for part in ("embedding", "final_norm", "lm_head"))

_VECTORS: Final = {
    "attn_norm": ("attn_norm",),
    "qkv_bias": ("q_bias", "k_bias", "v_bias"),
    "q_norm": ("q_norm",),
    "k_norm": ("k_norm",),
    "o_bias": ("o_bias",),
    "mlp_norm": ("mlp_norm",),
    "attn_post_norm": ("attn_post_norm",),
    "mlp_post_norm": ("mlp_post_norm",),
    "router": ("router",),
}
"""Our field -> the parts of a layer, as `families` calls them, that lie in it one after the other."""

_ROTATED: Final = ("q", "k", "q_bias", "k_bias", "q_norm", "k_norm")
"""Parts that have a row for each channel of a head, and heads that are rotated."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Matrices are input-major, one per site: input channel k is row k.

    Attributes:
        attn_norm, mlp_norm: [hidden], of the norm before attention and MLP, or None.
        attn_post_norm, mlp_post_norm: [hidden], of the norm after them, before the residual addition, or None.
        qkv: [hidden, Nq + 2 Nkv], the columns of q, then k, then v; those of a head of q and k in `rope.head_order`.
        qkv_bias: [Nq + 2 Nkv] or None.
        q_norm, k_norm: [head_dim], or [Nq] and [Nkv] if `wide_head_norms`, or None.
        attn_out: [Nq, hidden].  o_bias: [hidden] or None.
        gate_up: [hidden, 2 intermediate], the columns of gate, then up.
        down: [intermediate, hidden].
        router: [E, hidden] of a layer with a mixture of experts, whose gate_up and down are `Experts`; else None.
    """

    attn_norm: Tensor | None
    qkv: Matrix
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    attn_out: Matrix
    o_bias: Tensor | None
    mlp_norm: Tensor | None
    gate_up: Matrix
    down: Matrix
    attn_post_norm: Tensor | None = None
    mlp_post_norm: Tensor | None = None
    router: Tensor | None = None

    def matrix(self, site: str) -> Matrix:
        """What the vector of a site is multiplied by."""
        return {"attn_in": self.qkv, "attn_out": self.attn_out, "mlp_in": self.gate_up, "mlp_mid": self.down}[site]


class Checkpoint:
    """A folder with config.json and safetensors, one file or many with an index.

    Opening it reads headers only, and compares every tensor that will be read with the config: name, shape, dtype.

    Attributes:
        path: the folder.
        config: what config.json says.
        quantization: how its matrices are packed; None where they are floats.
        fp8: how those of its matrices that are 8-bit floats are scaled; they are multiplied out as they are read.

    Raises:
        NotFoundError, UsageError, TealError: as `load_config`; also for a missing or truncated weight file, a missing
            tensor, a wrong shape, or a tensor stored in a quantised dtype. File, tensor, and its part in the row of
            the family are named.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config: ModelConfig = load_config(self.path)
        family = FAMILIES[self.config.family]
        self.quantization: Quantization | None = _quantization(self.path)
        self.fp8: Fp8 | None = fp8_of(read_json(self.path / "config.json"))
        mixture = self.config.mixture
        mixed = (False,) * self.config.layers if mixture is None else mixture.layers
        kinds = {kind: parts_of(self.config, family, mixed=kind) for kind in set(mixed)}
        self._parts = [kinds[kind] for kind in mixed]
        self._order = head_order(self.config)
        self._files: dict[str, Path] = _index(self.path)
        self._check()

    def layer(
        self, index: int, dtype: torch.dtype, device: Device = "cpu", empty: Callable[..., Tensor] = torch.empty
    ) -> LayerWeights:
        """The weights of one layer, cast to `dtype` on `device`; new memory at each call, matrices from `empty`."""
        fields: dict[str, Matrix | Tensor | None] = {}
        config = self.config
        with self._reading() as read:
            for field, site in MATRICES.items():
                widths = config.segments(site)
                if self.quantization is not None:
                    layout = self.quantization.rows(widths)
                    fields[field] = self._packed(read, packed_name(index, field), layout, dtype, device, empty)
                    continue
                experts = self._parts[index][SITE_PROJECTIONS[site][0]].experts
                if experts is None or config.mixture is None:
                    fused = empty(config.channels(site), sum(widths), dtype=dtype, device=device)
                    self._read_matrix(read, index, site, fused, widths)
                    fields[field] = FloatMatrix(fused, widths)
                    continue
                kind, channels, widths = of_one_expert(config, config.mixture, site)
                each = empty(experts, channels, sum(widths), dtype=dtype, device=device)
                for expert, matrix in enumerate(each):
                    self._read_matrix(read, index, site, matrix, widths, expert)
                fields[field] = kind(each, widths, config.mixture.routed)
            for field, parts in _VECTORS.items():
                vectors = [
                    self._part(read, index, part).to(device, dtype) for part in parts if part in self._parts[index]
                ]
                fields[field] = torch.cat(vectors) if vectors else None
        return LayerWeights(**fields)  # type: ignore[arg-type]

    def _read_matrix(
        self, read: Any, index: int, site: str, fused: Tensor, widths: tuple[int, ...], expert: int | None = None
    ) -> None:
        """fused [K, N] = the projections of a site, or those of one expert, side by side."""
        for part, columns in zip(SITE_PROJECTIONS[site], fused.split(widths, dim=1), strict=True):
            _transpose_into(columns, self._part(read, index, part, expert))

    def _part(self, read: Any, index: int, part: str, expert: int | None = None) -> Tensor:
        """A part of a layer out of the tensor that it lies in, heads in our order; not to be written to."""
        found = self._parts[index][part]
        name = _layer(index) + found.name.format(expert)
        tensor = read(name)[expert][found.rows] if found.stacked else self._floats(read, name, found.rows)
        if self._order is None or part not in _ROTATED:
            return tensor
        return tensor.unflatten(0, (-1, len(self._order)))[:, self._order].flatten(0, 1)

    def _floats(self, read: Any, name: str, rows: slice) -> Tensor:
        """Rows of a tensor; those of a matrix of 8-bit floats in float32."""
        tensor: Tensor = read(name)
        if self.fp8 is None or tensor.dtype != torch.float8_e4m3fn:
            return tensor[rows]
        scales: Tensor = read(scale_name(name, self._files))
        floats = self.fp8.multiply(tensor, scales, rows)
        if not floats.isfinite().all():
            wrong = name if scales.float().isfinite().all() else scale_name(name, self._files)
            raise TealError(
                f"{self._files[name]}: {wrong} has numbers that are not finite{self._role(wrong)}", hint=_HINT
            )
        return floats

    def _packed(
        self,
        read: Any,
        name: str,
        layout: RowLayout,
        dtype: torch.dtype,
        device: Device,
        empty: Callable[..., Tensor],
    ) -> PackedMatrix:
        stored = read(name)
        data = empty(*stored.shape, dtype=stored.dtype, device=device)  # begins at a cache line, unlike a mapped tensor
        data.copy_(stored)
        try:
            return PackedMatrix(data, layout, dtype)
        except ValueError as error:
            raise TealError(f"{self._files[name]}: {name} is damaged ({error})", hint=_HINT) from error

    def embedding(self, dtype: torch.dtype, device: Device = "cpu") -> Matrix:
        """Token embedding [vocab, hidden]."""
        return self._table(_EMBEDDING, dtype, device)

    def final_norm(self, dtype: torch.dtype, device: Device = "cpu") -> Tensor:
        """Weight of the RMSNorm before the head, [hidden]."""
        with self._reading() as read:
            norm: Tensor = read(_NORM).to(device, dtype, copy=True)
        return norm

    def lm_head(self, dtype: torch.dtype, device: Device = "cpu") -> Matrix:
        """Output head [vocab, hidden] of a model where it is not `tied`."""
        return self._table(_HEAD, dtype, device)

    def stored(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors by their names in the files, as they are stored; new memory."""
        with self._reading() as read:
            return {name: read(name).clone() for name in names}

    def tied(self) -> bool:
        """Whether the embedding serves as the output head.

        The config says so; but as in transformers, a head that lies in the files and differs from the embedding wins.
        """
        head = self._stored_name(_HEAD)
        if not self.config.tied or head not in self._files:
            return self.config.tied
        with self._reading() as read:
            return torch.equal(read(head), read(self._stored_name(_EMBEDDING)))

    def _table(self, name: str, dtype: torch.dtype, device: Device) -> Matrix:
        with self._reading() as read:
            if self._table_rows is not None:
                return self._packed(read, packed_table(name), self._table_rows, dtype, device, torch.empty)
            return FloatMatrix(read(name).to(device, dtype, copy=True))

    @property
    def _table_rows(self) -> RowLayout | None:
        return None if self.quantization is None else self.quantization.table_rows(self.config.hidden)

    def _stored_name(self, table: str) -> str:
        return table if self._table_rows is None else packed_table(table)

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that will be read, with its shape as stored."""
        config = self.config
        packed = {part for parts in SITE_PROJECTIONS.values() for part in parts} if self.quantization else set()
        expected = {  # parts of one name: the last of them ends where the tensor does
            _layer(i) + name: found.stored
            for i, parts in enumerate(self._parts)
            for part, found in parts.items()
            if part not in packed
            for name in found.names()
        }
        expected[_NORM] = (config.hidden,)
        embedding, head = self._stored_name(_EMBEDDING), self._stored_name(_HEAD)
        width = config.hidden if self._table_rows is None else self._table_rows.stride
        expected[embedding] = (config.vocab, width)
        if not config.tied or head in self._files:
            expected[head] = (config.vocab, width)
        if self.quantization is not None:
            for field, site in MATRICES.items():
                rows = config.channels(site), self.quantization.rows(config.segments(site)).stride
                expected |= {packed_name(i, field): rows for i in range(config.layers)}
        return expected

    def _check(self) -> None:
        with self._opened() as open_file:
            for name, shape in self._expected().items():
                stored = self._check_one(open_file, name, (shape,))
                if stored == FP8 and self.fp8 is not None and name.startswith(_LAYERS) and len(shape) == 2:
                    name, allowed = scale_name(name, self._files), self.fp8.shapes(*shape)
                    stored = self._check_one(open_file, name, allowed)
                    readable: tuple[str, ...] = SCALE_DTYPES
                else:
                    readable = _PACKED if name.endswith(".packed") else _STORED
                if stored not in readable:
                    raise UsageError(
                        f"{self._files[name]}: {name} is stored as {stored}{self._role(name)}; teal reads bf16, fp16 "
                        "and fp32, and matrices in fp8 where config.json says how they are scaled",
                        hint="choose the unquantised checkpoint of the same model",
                    )

    def _check_one(self, open_file: Callable[[Path], Any], name: str, shapes: Sequence[tuple[int, ...]]) -> str:
        """Whether a tensor is there, and of one of these shapes; what it is stored as."""
        if name not in self._files:
            raise TealError(f"the checkpoint {self.path} lacks the tensor {name}{self._role(name)}", hint=_HINT)
        part = open_file(self._files[name]).get_slice(name)
        if tuple(part.get_shape()) not in shapes:
            raise TealError(
                f"{self._files[name]}: {name} has the shape {part.get_shape()}, where config.json asks for "
                f"{' or '.join(str(list(shape)) for shape in shapes)}{self._role(name)}",
                hint=_HINT,
            )
        return str(part.get_dtype())

    def _role(self, name: str) -> str:
        """For messages: which parts of its family's row a tensor is, or its scales are of."""
        weight = next((name.removesuffix(end) for end in SCALES if name.endswith(end)), name)
        parts = [part for part, (of, _) in TOP.items() if of == weight]
        if name.startswith(_LAYERS):
            _, _, index, within = weight.split(".", 3)
            parts = [part for part, found in self._parts[int(index)].items() if within in found.names()]
        return f" ({', '.join(parts)} of the family {self.config.family})" if parts else ""

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        """A function file -> open safetensors file. All are closed, and so unmapped, at the end."""
        handles: dict[Path, Any] = {}

        def open_file(file: Path) -> Any:
            if file not in handles:
                handles[file] = _open(file)
            return handles[file]

        yield open_file

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        """A function name -> tensor mapped from its file: valid inside the block, not to be written to."""
        with self._opened() as open_file:

            def read(name: str) -> Tensor:
                file = self._files[name]
                try:
                    tensor: Tensor = open_file(file).get_tensor(name)
                except SafetensorError as error:
                    raise TealError(f"{file}: {name} cannot be read ({error})", hint=_HINT) from error
                return tensor

            yield read


def config_sha256(path: str | Path) -> str:
    """sha256 of a checkpoint folder's config.json, byte for byte, in hex; of a quantised model its parent's, since
    what was made for the parent serves it."""
    quantization = _quantization(Path(path))
    if quantization is not None:
        return quantization.parent_config_sha256
    return hashlib.sha256((Path(path) / "config.json").read_bytes()).hexdigest()


def _quantization(folder: Path) -> Quantization | None:
    file = folder / "config.json"
    return quantization_of(read_json(file), file)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise NotFoundError(f"the weight file {file} is missing", hint=_HINT) from error
    except (SafetensorError, OSError) as error:
        raise TealError(f"the weight file {file} is truncated or damaged ({error})", hint=_HINT) from error


def _index(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file it lies in."""
    index = folder / _INDEX
    single = folder / "model.safetensors"
    if single.exists():
        return dict.fromkeys(_open(single).keys(), single)
    if not index.exists():
        raise NotFoundError(
            f"{folder} has no safetensors weights (neither {single.name} nor {index.name})",
            hint="teal reads safetensors only; choose a revision of the model that carries them",
        )
    try:
        shards = sorted(set(read_json(index)["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise TealError(f"{index} is damaged ({error})", hint=_HINT) from error
    # The shards' own headers decide: an index that disagrees with them is seen as a missing tensor.
    return {name: folder / shard for shard in shards for name in _open(folder / shard).keys()}  # noqa: SIM118


def _transpose_into(columns: Tensor, tensor: Tensor) -> None:
    """columns [K, n], a slice of a wider matrix, = tensor [n, K] transposed, cast, and brought to its device.

    On a CPU in pieces that stay in the cache while they are turned, which is as fast as a plain copy (a fifth of
    the time of `columns.copy_(tensor.t())`); a GPU turns the whole.
    """
    rows = _TURNED_ROWS if columns.device.type == "cpu" else len(tensor)
    for part, target in zip(tensor.split(rows), columns.split(rows, dim=1), strict=True):
        target.copy_(part.to(target.device, target.dtype).t().contiguous())


def _layer(index: int) -> str:
    return f"{_LAYERS}{index}."
