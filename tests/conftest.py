"""Fixtures come from the `fixtures_*.py` modules beside this file."""

from __future__ import annotations

pytest_plugins = [
    "fixtures_cli", "fixtures_tiny", "fixtures_smollm2", "fixtures_hub", "fixtures_ready", "fixtures_talker",
]  # fmt: skip
