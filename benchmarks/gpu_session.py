"""Everything that needs a GPU, in one command of some eight minutes: tests, kernels, decoding, pictures.

    python benchmarks/gpu_session.py OUT [--minutes 8]

OUT is a folder; in it come `tests.txt`, `kernels-*.json`, `decode-*.json`, their tables as .txt, and pictures where
matplotlib is. The most important steps run first, each in a process of its own and with what time is left, so that one
that fails or hangs does not affect the others; `session.json` says how each ended. Needs no network and no
checkpoint: weights are random, of the real shapes. Of this project's dependencies, an image made for PyTorch usually
lacks zarr, numcodecs, donfig, google-crc32c, platformdirs, gguf, datasets and prompt_toolkit; pytest, pytest-xdist and
hypothesis are for the tests.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEAL = [sys.executable, "-m", "teal_cli"]
STACKS = ("llama-2-7b", "llama-3-8b", "mistral-7b", "qwen3-8b")
SEVENS = ",".join(STACKS)
FINAL_S = 20.0


@dataclass(frozen=True)
class Step:
    """A command, the file that gets its output, the most seconds it may take, and whether it may be cut off."""

    name: str
    command: list[str]
    most_s: float
    may_stop: bool = False


def steps(out: Path) -> list[Step]:
    """What is run, most important first."""
    # The project's own options ask for plugins that a GPU machine need not have, and it may have others that warn.
    options = ["-q", "-m", "gpu", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider"]
    options += ["-p", "no:benchmark"]
    if importlib.util.find_spec("xdist"):  # one after the other they take some eight minutes
        options += ["-n", str(min(12, os.cpu_count() or 1))]
    ignored = ["-W", "ignore::pytest.PytestConfigWarning"]
    tests = [sys.executable, "-m", "pytest", *options, *ignored, "tests/kernels", "tests/decoding"]

    def kernels(dtype: str) -> Step:
        target = out / f"kernels-{dtype}.json"
        command = [*TEAL, "bench", "kernels", "--shapes", SEVENS, "--dtype", dtype, "--rounds", "15"]
        return Step(target.stem, [*command, "--output", str(target), "--force"], 150)

    def decode(shape: str, dtype: str, layers: int) -> Step:
        target = out / f"decode-{shape}-{dtype}.json"
        command = [*TEAL, "bench", "decode", "--stack", f"{shape}:{layers}", "--dtype", dtype, "--rounds", "7"]
        return Step(target.stem, [*command, "--output", str(target), "--force"], 90)

    return [
        Step("tests", tests, 150),
        kernels("bfloat16"),
        decode("llama-2-7b", "float16", 32),
        decode("llama-3-8b", "bfloat16", 32),
        kernels("float16"),
        decode("mistral-7b", "bfloat16", 32),
        decode("qwen3-8b", "bfloat16", 36),
        # Compiles for minutes; a search that is stopped keeps what it found, and a later session measures with it.
        Step("tune", [*TEAL, "bench", "kernels", "--shapes", SEVENS, "--dtype", "bfloat16", "--tune"], 3600, True),
    ]


def run(step: Step, out: Path, left_s: float) -> dict[str, object]:
    """Run a step with its output in OUT/<name>.txt; how it ended, as a JSON object."""
    allowed = min(step.most_s, left_s)
    start = time.monotonic()
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH"))))
    with (out / f"{step.name}.txt").open("w", encoding="utf-8") as log:
        try:
            finished = subprocess.run(
                step.command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": path},
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=allowed,
                check=False,
            )
            ended: int | str = finished.returncode
        except subprocess.TimeoutExpired:
            ended = f"stopped after {allowed:.0f} s"
    return {**asdict(step), "ended": ended, "seconds": round(time.monotonic() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all of it")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * arguments.minutes - FINAL_S
    ended: list[dict[str, object]] = []
    for step in steps(out):
        left = deadline - time.monotonic()
        if left < FINAL_S:
            ended.append({**asdict(step), "ended": "no time left", "seconds": 0})
        else:
            ended.append(run(step, out, left))
        sys.stdout.write(f"{ended[-1]['name']}: {ended[-1]['ended']} ({ended[-1]['seconds']} s)\n")
        sys.stdout.flush()
        (out / "session.json").write_text(json.dumps(ended, indent=1) + "\n", encoding="utf-8")
    for result in sorted(out.glob("*-*.json")):
        command = [*TEAL, "plot", "bench", str(result), "-o", str(result.with_suffix(".png")), "--force"]
        run(Step(f"plot-{result.stem}", command, FINAL_S), out, FINAL_S)
    cut_off = [step["may_stop"] and isinstance(step["ended"], str) for step in ended]
    return 0 if all(step["ended"] == 0 or cut for step, cut in zip(ended, cut_off, strict=True)) else 1


if __name__ == "__main__":
    sys.exit(main())
