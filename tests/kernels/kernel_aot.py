"""Compile a kernel for a GPU that is not there, and read what the compiler made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from teal_kernels.configs import EXACT

POINTER_TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}


def wide_loads(ptx: str) -> list[str]:
    """The 16-byte loads from global memory in a piece of PTX."""
    return re.findall(r"ld\.global\S*\.(?:v4\.b32|v2\.b64)", ptx)


@dataclass(frozen=True)
class Compiled:
    """PTX text, and what `cuobjdump --dump-resource-usage` says of the machine code."""

    ptx: str
    registers: int
    stack: int
    local: int

    def vector_loads(self) -> list[str]:
        """The 16-byte loads from global memory."""
        return wide_loads(self.ptx)

    def loops(self) -> list[str]:
        """The text between each label and the last branch back to it."""
        lines = self.ptx.splitlines()
        labels = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith("$L__BB")}
        ends: dict[int, int] = {}
        for i, line in enumerate(lines):
            branch = re.search(r"\sbra(?:\.uni)?\s+(\$L__BB\w+);", line)
            if branch and labels.get(branch[1], i) < i:
                ends[labels[branch[1]]] = i
        return ["\n".join(lines[begin:end]) for begin, end in ends.items()]

    def assert_no_spills(self) -> None:
        assert self.stack == 0, f"{self.stack} bytes of stack"
        assert self.local == 0, f"{self.local} bytes of local memory"
        assert ".local" not in self.ptx


def compile_kernel(kernel, arguments: dict[str, str], constants: dict, capability: int, warps: int = 4) -> Compiled:
    """Compile for compute capability `capability`; pointers and integers are taken as divisible by 16."""
    if "OVERLAP" in kernel.arg_names:
        constants = constants | {"OVERLAP": capability >= 90}
    signature = {name: "constexpr" if name in constants else arguments[name] for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in arguments and (arguments[name].startswith("*") or arguments[name] == "i32")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, **EXACT})
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout

    def number(key: str) -> int:
        found = re.search(rf"\b{key}:(\d+)", usage)
        assert found, usage
        return int(found[1])

    return Compiled(ptx=built.asm["ptx"], registers=number("REG"), stack=number("STACK"), local=number("LOCAL"))
