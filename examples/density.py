"""Open a level with xarray, and draw how much each projection of each layer keeps.

python examples/density.py STORE [PICTURE] [LEVEL]
"""

from __future__ import annotations

import sys

import xarray
from matplotlib.figure import Figure

from teal_kernels.spec import PROJECTIONS


def main(path: str, picture: str = "density.png", level: str = "0.5") -> None:
    data = xarray.open_dataset(path, engine="teal", level=level)  # lazy: [layer, token, <site>_channel] for each name
    kept = [(data[name] != 0).mean(data[name].dims[1:]) for name in PROJECTIONS]
    density = xarray.concat(kept, dim=data["projection"]).rename("kept entries")

    figure = Figure(figsize=(6, 4), layout="constrained")
    density.plot.imshow(x="projection", y="layer", ax=figure.add_subplot(), cmap="cividis", vmin=0)
    figure.savefig(picture)
    for name, mean in zip(PROJECTIONS, density.mean("layer").values, strict=True):
        print(f"{name:5s} {mean:6.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
