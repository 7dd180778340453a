"""A store, or a part of it, in other forms; `formats` has the writers.

Everything is first written beside the target and renamed in when it is whole. bfloat16 becomes float32, exactly,
where the form has no bfloat16. What was converted, where it comes from and what the form drops is in teal.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from teal_cli.errors import UsageError
from teal_cli.files import AGAIN, check_new_folder, disk_errors, new_folder, occupied, read_json, write_json
from teal_cli.registry.registry import Registry
from teal_cli.store.formats import FORMATS
from teal_cli.store.kept_weights import layer_weights, model_outputs, open_checkpoint, write_weights
from teal_cli.store.part import Part
from teal_cli.store.placing import destination
from teal_cli.store.reader import ActivationStore, Level
from teal_cli.store.selection import Selection
from teal_kernels.spec import OUTPUT_SITE, PROJECTION_SITE, PROJECTIONS, SITE_PROJECTIONS, SITES

SIDECAR: Final = "teal.json"


@dataclass(frozen=True)
class Converted:
    """Progress: one more array (level, layer, name) is written.

    Attributes:
        path: file or folder, below the target.
        done, total: arrays.
    """

    path: Path
    done: int
    total: int


def convert(
    store: ActivationStore,
    out: Path,
    form: str,
    selection: Selection,
    *,
    force: bool = False,
    model: Path | None = None,
    registry: Registry | None = None,
) -> Iterator[Converted]:
    """Writes a selection into a new folder, in one of `formats.FORMATS`, with teal.json beside it.

    Args:
        store: an open store.
        out: a folder that does not exist, or is empty.
        form: name of a format.
        selection: from `select`.
        force: replace a folder that an earlier conversion wrote.
        model: the checkpoint folder of the store's model; the weight rows of kept channels are then written, too.
        registry: where the store's model is looked up, for forms that say how wide an output is: a store does not tell
            those of k and v.

    Raises:
        UsageError: unknown form, occupied folder, sites asked for as .pt, tokens out of range, another model, a width
            that is needed and not known.
        TealError: a block is damaged, or the disk refuses.
    """
    if form not in FORMATS:
        raise UsageError(f"there is no format {form!r}", hint=f"formats: {', '.join(FORMATS)}")
    target = destination(out)
    source = store.path.resolve() if isinstance(store.path, Path) else None
    if source and (target.is_relative_to(source) or source.is_relative_to(target)):
        raise UsageError(f"{out} lies within the store that is read, or holds it", hint="give another folder")
    _check_target(target, force=force)
    if form == "pt" and any(name in SITES for name in selection.names):
        raise UsageError("one .pt is what one projection consumed; a site feeds several", hint="name projections")
    widths = _widths(store, selection.names, registry) if FORMATS[form].outputs else {}
    checkpoint = None if model is None else open_checkpoint(store, model)
    levels = {name: store.level(name) for name in selection.levels}
    spans = {name: tuple(selection.spans(level)) for name, level in levels.items()}
    with disk_errors(out, when_full=AGAIN), new_folder(target, replace=force) as partial:
        write_json(partial / SIDECAR, _provenance(store, form, selection, levels, spans))
        parts = list(_parts(selection, levels, spans, widths))
        total = len(parts) * (1 if checkpoint is None else 2)
        for done, part in enumerate(parts, 1):
            yield Converted(FORMATS[form].write(part, partial).relative_to(partial), done, total)
        if checkpoint is not None:
            done = len(parts)
            for layer in selection.layers:
                weights = layer_weights(checkpoint, layer, store)
                for part in parts:
                    if part.layer == layer:
                        done += 1
                        yield Converted(write_weights(part, weights, partial).relative_to(partial), done, total)


def _check_target(path: Path, *, force: bool) -> None:
    if not force:
        check_new_folder(path)
    elif occupied(path) and not _is_conversion(path):
        raise UsageError(
            f"{path} exists and is no conversion of a store", hint="choose another output; teal leaves it alone"
        )


def _is_conversion(path: Path) -> bool:
    try:
        note = read_json(path / SIDECAR)
    except (OSError, ValueError):
        return False
    return isinstance(note, dict) and {"store", "format", "drops"} <= note.keys()


def _widths(store: ActivationStore, names: Sequence[str], registry: Registry | None) -> dict[str, int]:
    """How wide the output of each name is: of a site, of all its projections together."""
    known = {projection: store.header.channels[site] for projection, site in OUTPUT_SITE.items()}
    wanted = {name: SITE_PROJECTIONS.get(name, (name,)) for name in names}
    if registry is not None and not all(known.keys() >= set(group) for group in wanted.values()):
        known |= model_outputs(store, registry)
    missing = [name for name, group in wanted.items() if not known.keys() >= set(group)]
    if missing:
        raise UsageError(
            f"the store does not tell how wide the output of {missing[0]} is",
            hint=f"download {store.header.model}, which does, or leave out k, v and attn_in with --names",
        )
    return {name: sum(known[projection] for projection in group) for name, group in wanted.items()}


def _parts(
    selection: Selection, levels: dict[str, Level], spans: dict[str, tuple[slice, ...]], widths: Mapping[str, int]
) -> Iterator[Part]:
    for level in levels.values():
        for layer in selection.layers:
            for name in selection.names:
                array = level.site(layer, name) if name in SITES else level.projection(layer, name)
                yield Part(level, layer, name, array, spans[level.name], widths.get(name))


def _provenance(
    store: ActivationStore,
    form: str,
    selection: Selection,
    levels: dict[str, Level],
    spans: dict[str, tuple[slice, ...]],
) -> dict[str, Any]:
    """What teal.json says. `tokens` is from the first selected row to after the last; `spans` is exact."""
    return {
        "store": dict(store.attrs),
        "format": form,
        "drops": list(FORMATS[form].drops),
        "layers": list(selection.layers),
        "names": list(selection.names),
        "sites": {name: PROJECTION_SITE.get(name, name) for name in selection.names},
        "channels": {name: store.header.channels[PROJECTION_SITE.get(name, name)] for name in selection.names},
        "sequences": list(selection.sequences) or None,
        "tokens": {name: [min(s.start for s in own), max(s.stop for s in own)] for name, own in spans.items()},
        "spans": {name: [[s.start, s.stop] for s in own] for name, own in spans.items()},
        "projections": list(PROJECTIONS),
        "levels": {
            name: {
                "target": level.target,
                "allocation": level.allocation,
                "digest": level.state.digest,
                "complete": level.complete,
                "thresholds": level.thresholds.tolist(),  # [layer, projection], projections as listed above
            }
            for name, level in levels.items()
        },
    }
