"""What a quantised checkpoint says of itself: the section `teal_quantization` of its config.json, and its tensors.

The matrices of a layer lie in safetensors as packed rows (`teal_kernels.packing`), uint8 [K, stride], one per site,
named `model.layers.0.qkv.packed` and so on; embedding and head, where they are packed too, as
`model.embed_tokens.packed` and `lm_head.packed`, a row per token. Every other tensor is as in the parent. Calibrations
and plans of the parent serve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from teal_cli.errors import TealError
from teal_kernels.packing import VERSION, RowLayout

SECTION: Final = "teal_quantization"
WIDTHS: Final = {"int8": 8, "int4": 4}
"""What a width is called -> bits of a code."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the matrices of a checkpoint are packed.

    Attributes:
        layout: version of the layout of rows.
        bits, group: of `RowLayout`.
        parent, parent_revision: name and revision of the model that it was made of.
        parent_config_sha256: of the parent's config.json; calibrations and plans are made for it.
        head: bits of a code of embedding and head; None where they are floats.
    """

    layout: int
    bits: int
    group: int
    parent: str
    parent_revision: str
    parent_config_sha256: str
    head: int | None = None

    def rows(self, widths: tuple[int, ...]) -> RowLayout:
        """The layout of the rows of a matrix with projections of these widths."""
        return RowLayout(self.bits, self.group, widths)

    def table_rows(self, hidden: int) -> RowLayout | None:
        """The layout of the rows of embedding and head; None where they are floats."""
        return None if self.head is None else RowLayout(self.head, self.group, (hidden,))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def quantization_of(config: Mapping[str, Any], file: Path) -> Quantization | None:
    """The section of a config.json; None where there is none.

    Raises:
        TealError: it is damaged, or of a version that this teal does not read.
    """
    section = config.get(SECTION)
    if section is None:
        return None
    hint = "make the model again with `teal quantize`"
    try:
        found = Quantization(**section)
        if isinstance(found.head, bool):  # before it was chosen: the matrices' bits, or floats
            found = replace(found, head=found.bits if found.head else None)
        if found.layout == VERSION:
            found.rows((1,))
            found.table_rows(1)
    except (TypeError, ValueError) as error:
        raise TealError(f"{file}: the section {SECTION} is damaged ({error})", hint=hint) from error
    if found.layout != VERSION:
        raise TealError(
            f"{file}: weights are packed in layout {found.layout}, and this teal reads {VERSION}", hint=hint
        )
    return found


def packed_table(name: str) -> str:
    """The tensor that holds an embedding or a head; `name`: what it is called where it is not packed."""
    return name.removesuffix(".weight") + ".packed"


def packed_name(index: int, field: str) -> str:
    """The tensor that holds a matrix of a layer; field as in `LayerWeights`."""
    return f"model.layers.{index}.{field}.packed"
