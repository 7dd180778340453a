"""teal: training-free activation sparsity for LLM decoding.

    import teal_cli

    teal_cli.download("smollm2-135m")
    teal_cli.calibrate("smollm2-135m")
    session = teal_cli.open_session("smollm2-135m")
    print(teal_cli.generate(session, "The capital of France is", sparsity=0.5).text)
    store = teal_cli.dump(session, "activations.zarr", levels=(0.5, 0.9))

Everything is imported on first use, so that `import teal_cli` and the command line's start cost nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from teal_cli.version import __version__ as __version__

if TYPE_CHECKING:
    from teal_cli.api import calibrate as calibrate
    from teal_cli.api import download as download
    from teal_cli.api import dump as dump
    from teal_cli.api import generate as generate
    from teal_cli.api import open_session as open_session
    from teal_cli.store.reader import open_store as open_store

__all__ = ["__version__", "calibrate", "download", "dump", "generate", "open_session", "open_store"]


def __getattr__(name: str) -> Any:
    if name == "open_store":  # needs no torch, so it does not come by way of the others
        from teal_cli.store.reader import open_store

        return open_store
    if name in __all__:
        from teal_cli import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
