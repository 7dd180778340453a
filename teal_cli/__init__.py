"""teal: training-free activation sparsity for LLM decoding.

The library's door is `open_store`, which reads what a dump wrote. It is imported on first use, so that `import
teal_cli` and the command line's start cost nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teal_cli.store.reader import open_store as open_store

__all__ = ["__version__", "open_store"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "open_store":
        from teal_cli.store.reader import open_store

        return open_store
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
