"""The parts of a layer, as `families` calls them: in which tensor each lies, which of its rows it is, and its shape."""

from __future__ import annotations

from dataclasses import dataclass

from teal_cli.model.config import ModelConfig
from teal_cli.model.families import Family
from teal_cli.model.mixtures import MIXTURES, Mixture
from teal_kernels.experts import ExpertInputs, ExpertOutputs
from teal_kernels.spec import SITE_PROJECTIONS


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a layer: the tensor that it lies in, which rows of that it is, and its own shape.

    `experts` where each of so many experts has the part; their tensors are one with `stacked`.
    """

    name: str
    rows: slice
    shape: tuple[int, ...]
    experts: int | None

    @property
    def stacked(self) -> bool:
        return self.experts is not None and "{}" not in self.name

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of the tensor, where this is its last part."""
        own = (self.rows.stop, *self.shape[1:])
        return (self.experts or 0, *own) if self.stacked else own

    def names(self) -> list[str]:
        """Its tensors, of which each expert may have one."""
        return [self.name] if "{}" not in self.name else [self.name.format(i) for i in range(self.experts or 0)]


def parts_of(config: ModelConfig, family: Family, *, mixed: bool) -> dict[str, Part]:
    """Every part of a layer, or of one with a mixture of experts."""
    names = family.parts(config.hf) | (MIXTURES[config.family].tensors if mixed else {})
    wide, mixture = config.traits.wide_head_norms, config.mixture if mixed else None
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (config.hidden,))  # but for these, a norm over all of it
    shapes["q_norm"] = ((config.heads if wide else 1) * config.head_dim,)
    shapes["k_norm"] = ((config.kv_heads if wide else 1) * config.head_dim,)
    for site, projections in SITE_PROJECTIONS.items():
        for part, width in zip(projections, config.segments(site), strict=True):
            shapes[part] = (width, config.channels(site))
            shapes[f"{part}_bias"] = (width,)
    of_experts: tuple[str, ...] = ()
    if mixture is not None:
        shapes["router"] = (mixture.experts, config.hidden)
        for site in ("mlp_in", "mlp_mid"):
            _, channels, widths = of_one_expert(config, mixture, site)
            of_experts += SITE_PROJECTIONS[site]
            shapes |= {part: (width, channels) for part, width in zip(SITE_PROJECTIONS[site], widths, strict=True)}
    ends: dict[str, int] = {}
    parts = {}
    for part, (name, _) in names.items():
        start = ends.get(name, 0)
        ends[name] = start + shapes[part][0]
        experts = mixture.experts if mixture is not None and part in of_experts else None
        parts[part] = Part(name, slice(start, ends[name]), shapes[part], experts)
    return parts


def of_one_expert(
    config: ModelConfig, mixture: Mixture, site: str
) -> tuple[type[ExpertInputs | ExpertOutputs], int, tuple[int, ...]]:
    """What holds an expert's matrix at a site, its width K, and the widths of its projections."""
    if site == "mlp_in":
        return ExpertInputs, config.hidden, (mixture.width, mixture.width)
    return ExpertOutputs, mixture.width, (config.hidden,)
