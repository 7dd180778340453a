"""Names, sizes and stacks of matrices."""

from __future__ import annotations

import pytest

from teal_cli.bench.shapes import MODEL_SHAPES, parse_shapes, parse_stack
from teal_cli.errors import UsageError


def test_a_model_has_four_matrices() -> None:
    found = {matrix.name: (matrix.inputs, matrix.segments) for matrix in parse_shapes("llama-3-8b")}
    assert found == {
        "qkv": (4096, (4096, 1024, 1024)),
        "o": (4096, (4096,)),
        "gate_up": (4096, (14336, 14336)),
        "down": (14336, (4096,)),
    }


def test_equal_matrices_are_measured_once_under_all_their_names() -> None:
    matrices = parse_shapes("llama-3-8b, mistral-7b,256x100")
    assert len(matrices) == 5
    assert matrices[0].models == ("llama-3-8b", "mistral-7b")
    assert (matrices[4].name, matrices[4].inputs, matrices[4].outputs, matrices[4].models) == ("256x100", 256, 100, ())
    assert {name for matrix in parse_shapes("all") for name in matrix.models} == set(MODEL_SHAPES)


@pytest.mark.parametrize(
    ("text", "hint"), [("lama-2-7b", "did you mean llama-2-7b"), ("0x5", "inputs x outputs"), (" , ", "shapes:")]
)
def test_what_is_no_shape_is_refused_with_a_hint(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_shapes(text)
    assert error.value.hint is not None
    assert hint in error.value.hint


def test_stacks() -> None:
    assert parse_stack("llama-2-7b:4") == ("llama-2-7b", MODEL_SHAPES["llama-2-7b"], 4)
    assert parse_stack("qwen3-8b")[2] == 36
    for text in ("llama-2-7b:0", "llama-2-7b:many", "lama:2"):
        with pytest.raises(UsageError):
            parse_stack(text)
