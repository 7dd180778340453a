"""Perplexity beside speed, so that nobody is offered one without the other: of our levels by the same pass as
`teal eval`, of llama.cpp over the same windows of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from teal_cli.bench.engines import LlamaCpp
from teal_cli.bench.subjects import Subject
from teal_cli.data.windows import Window
from teal_cli.passes.layers import ResidentLayers
from teal_cli.registry.registry import Registry
from teal_cli.runs.calibrate import Text
from teal_cli.runs.evaluate import EvalRequest, Evaluate, Evaluation


@dataclass
class Quality:
    """How text is scored.

    Attributes:
        text: dataset, number of windows and their length; at most the context of a model.
        calibration: id or folder; None takes the model's default.
        windows: those of the text, once a model of ours has been scored.
    """

    text: Text
    calibration: str | None = None
    windows: Sequence[Window] = ()

    def of(self, subject: Subject, sparsities: Sequence[float]) -> dict[float, float]:
        """Perplexity of the dense model and of each level, of a model of the registry.

        Raises:
            UsageError, NotFoundError, TealError: as `Evaluate`.
        """
        text = replace(self.text, seq_len=min(self.text.seq_len, subject.config.context))
        request = EvalRequest(
            text, (0.0, *sparsities), model=subject.name, calibration=self.calibration, dtype=subject.dtype,
            device=str(subject.model.device),
        )  # fmt: skip
        evaluate = Evaluate(Registry(), request)
        self.windows = evaluate.windows.windows
        *_, result = evaluate.run(ResidentLayers(subject.model))
        assert isinstance(result, Evaluation), "comes last"
        return {level.sparsity: level.perplexity for level in result.levels}

    def of_llama(self, engine: LlamaCpp) -> float:
        """Perplexity of llama.cpp over the same windows."""
        found = [engine.log_probabilities(window.inputs, window.targets) for window in self.windows]
        return math.exp(-sum(float(one.sum()) for one in found) / sum(len(one) for one in found))
