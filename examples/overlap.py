"""How much of what a token keeps the next one keeps too, layer by layer: what a cache of weight rows could save.

python examples/overlap.py STORE [LEVEL] [PROJECTION]
"""

from __future__ import annotations

import sys

import numpy as np

import teal_cli


def main(path: str, level: str = "0.5", projection: str = "gate") -> None:
    store = teal_cli.open_store(path)
    found = store.level(level)
    follows = np.diff(found.tokens.sequence.astype(int)) == 0  # pairs of neighbours within a sequence
    print("layer   kept  kept by the token before")
    for layer in range(store.header.layers):
        kept = found.projection(layer, projection).mask[:]
        both = (kept[1:] & kept[:-1])[follows].sum()
        print(f"{layer:5d}  {kept.mean():5.1%}  {both / max(1, kept[1:][follows].sum()):6.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
