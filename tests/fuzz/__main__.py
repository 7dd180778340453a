"""`python -m tests.fuzz --minutes N [--area NAME] [--seed SEED]`: fuzz for a while, from another seed each time.

Prints every failure, and a table of the cases tried and failed; exits 1 if there is a failure.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.areas import AREAS
from fuzz.harness import run_case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--area", choices=[area.name for area in AREAS])
    parser.add_argument("--seed", type=int, help="only this case")
    arguments = parser.parse_args()
    areas = [area for area in AREAS if arguments.area in (None, area.name)]
    first = time.time_ns() // 1_000_000 if arguments.seed is None else arguments.seed
    tried, failed = dict.fromkeys(areas, 0), dict.fromkeys(areas, 0)
    end = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as folder:
        sound = {area: Path(folder, area.name) for area in areas}
        for area, place in sound.items():
            area.make(place)
        for seed in count(first):
            for area in areas:
                for turn in range(area.weight if arguments.seed is None else 1):
                    failure = run_case(area, sound[area], seed * 10 + turn if arguments.seed is None else seed)
                    tried[area] += 1
                    if failure:
                        failed[area] += 1
                        sys.stdout.write(f"{failure}\n")
            if arguments.seed is not None or time.monotonic() > end:
                break
    for area in areas:
        sys.stdout.write(f"{area.name:<18} {tried[area]:>7} cases {failed[area]:>5} failures\n")
    return 1 if any(failed.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
