"""The names and widths of what flows through a layer, in the order every array of teal uses.

A *site* is one distinct input vector of a layer; a *projection* is one linear layer. q, k and v read the same vector,
and so do gate and up, hence four sites for seven projections. Nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SITE_PROJECTIONS: Final[dict[str, tuple[str, ...]]] = {
    "attn_in": ("q", "k", "v"),
    "attn_out": ("o",),
    "mlp_in": ("gate", "up"),
    "mlp_mid": ("down",),
}

SITES: Final[tuple[str, ...]] = tuple(SITE_PROJECTIONS)
PROJECTIONS: Final[tuple[str, ...]] = tuple(p for group in SITE_PROJECTIONS.values() for p in group)

SITE_INDEX: Final[dict[str, int]] = {site: i for i, site in enumerate(SITES)}
PROJECTION_INDEX: Final[dict[str, int]] = {projection: i for i, projection in enumerate(PROJECTIONS)}

PROJECTION_SITE: Final[dict[str, str]] = {p: site for site, group in SITE_PROJECTIONS.items() for p in group}

OUTPUT_SITE: Final[dict[str, str]] = {
    "q": "attn_out",
    "o": "mlp_in",
    "gate": "mlp_mid",
    "up": "mlp_mid",
    "down": "mlp_in",
}
"""The site that is as wide as a projection's output; none is as wide as those of k and v."""


def columns(site: str) -> slice:
    """Which of the seven projections read a site, as a slice of an array's axis in the order of `PROJECTIONS`."""
    group = SITE_PROJECTIONS[site]
    first = PROJECTION_INDEX[group[0]]
    return slice(first, first + len(group))


@dataclass(frozen=True, slots=True)
class Geometry:
    """Widths of a decoder layer.

    Attributes:
        hidden: width of the residual stream.
        intermediate: width between the two halves of the MLP.
        heads, kv_heads: of queries, and of keys and values; the first is a multiple of the second.
        head_dim: width of one head, even.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def query_width(self) -> int:
        """Width of all query heads, which is the input of the output projection."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.kv_heads * self.head_dim

    def channels(self, site: str) -> int:
        """Width K of the vector at a site."""
        return {"attn_out": self.query_width, "mlp_mid": self.intermediate}.get(site, self.hidden)

    def segments(self, site: str) -> tuple[int, ...]:
        """Output widths of the projections that read a site, ordered as `SITE_PROJECTIONS`; their sum is N."""
        widths = {
            "attn_in": (self.query_width, self.kv_width, self.kv_width),
            "mlp_in": (self.intermediate, self.intermediate),
        }
        return widths.get(site, (self.hidden,))

    def inputs(self) -> tuple[int, ...]:
        """Input width K of each of the seven projections."""
        return tuple(self.channels(PROJECTION_SITE[projection]) for projection in PROJECTIONS)

    def outputs(self) -> tuple[int, ...]:
        """Output width N of each of the seven projections."""
        return tuple(width for site in SITES for width in self.segments(site))

    def projection_sizes(self) -> dict[str, int]:
        """Entries K * N of each projection's matrix in one layer."""
        return dict(zip(PROJECTIONS, (k * n for k, n in zip(self.inputs(), self.outputs(), strict=True)), strict=True))
