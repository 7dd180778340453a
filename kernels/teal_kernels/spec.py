"""The names of what flows through a layer, in the order every array of teal uses.

A *site* is one distinct input vector of a layer; a *projection* is one linear layer. q, k and v read the same vector,
and so do gate and up, hence four sites for seven projections. Constants only: nothing heavy is imported here.
"""

from __future__ import annotations

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
