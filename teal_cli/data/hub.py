"""Datasets of the Hugging Face hub, streamed, or from the cache of `datasets` while offline.

Every failure of the two libraries below becomes one sentence. This module knows neither names of configs/ nor columns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from teal_cli.errors import AuthError, NotFoundError, TealError, UsageError
from teal_cli.registry.sources.hub import transport_error

Rows = Callable[[], Iterator[dict[str, Any]]]

_NO_NETWORK_HINT = "check the network; `python-docs` and local files need none, HF_HUB_OFFLINE=1 reads what is cached"
_PROBE_SECONDS = 15.0


def load_datasets() -> Any:
    """The `datasets` library, imported late because it takes seconds, and told to be silent."""
    import datasets

    datasets.disable_progress_bars()
    # It logs each error that it raises; we say it once, in our words.
    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets


def hub_splits(repository: str, config: str | None) -> dict[str, Rows]:
    """The splits of a hub dataset, each a function that streams its rows.

    Raises:
        NotFoundError: no such repository, or not in the cache while offline.
        AuthError: gated or private.
        UsageError: the repository has several configurations, or not this one.
        TealError: the hub cannot be reached.
    """
    datasets = load_datasets()
    if not datasets.config.HF_HUB_OFFLINE:
        _probe(repository)
    try:
        splits = datasets.load_dataset(repository, config, streaming=True)
    except ConnectionError as error:
        raise (
            _not_cached(repository, error) if datasets.config.HF_HUB_OFFLINE else _unreachable(repository)
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise _missing(repository) from error
    except ValueError as error:
        if "config" not in str(error).lower():
            raise TealError(f"the dataset {repository} cannot be read: {_first_line(error)}") from error
        # Its message ends with the list of them.
        _, _, there = str(error).rpartition("[")
        raise UsageError(
            f"{repository}: {_first_line(error)}",
            hint=f"name one as {repository}:CONFIG; there are {there.partition(']')[0]}",
        ) from error
    except (OSError, RuntimeError) as error:
        raise TealError(f"the dataset {repository} cannot be read: {_first_line(error)}") from error
    return {name: _streaming(repository, split) for name, split in splits.items()}


def _probe(repository: str) -> None:
    """Ask the hub once; `datasets` itself retries for half a minute before it gives up on the network."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(repository, timeout=_PROBE_SECONDS)
    except GatedRepoError as error:
        raise AuthError(
            f"the dataset {repository} is gated, and this account may not read it",
            hint=f"ask for access at huggingface.co/datasets/{repository}, then `hf auth login`",
        ) from error
    except RepositoryNotFoundError as error:
        raise _missing(repository) from error
    except HfHubHTTPError as error:
        raise TealError(f"the hub refused to show the dataset {repository}: {_first_line(error)}") from error
    except (OSError, transport_error()) as error:
        raise _unreachable(repository) from error


def _streaming(repository: str, split: Any) -> Rows:
    def rows() -> Iterator[dict[str, Any]]:
        try:
            yield from split
        except (OSError, ValueError, RuntimeError, transport_error()) as error:
            raise TealError(
                f"reading the dataset {repository} failed: {_first_line(error)}",
                hint="run it again; if it fails again, choose another dataset",
            ) from error

    return rows


def _missing(repository: str) -> NotFoundError:
    return NotFoundError(
        f"the hub has no dataset {repository}, or it is private",
        hint="check the name; for a private dataset, `hf auth login` first",
    )


def _unreachable(repository: str) -> TealError:
    return TealError(f"the hub cannot be reached for the dataset {repository}", hint=_NO_NETWORK_HINT)


def _not_cached(repository: str, error: Exception) -> NotFoundError:
    return NotFoundError(
        f"the dataset {repository} is not in the cache, and the hub is switched off ({error})",
        hint="unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE, or use `python-docs` or a local file",
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
