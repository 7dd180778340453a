"""Rows of a dump that are decoded: each level goes on with its own tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from teal_cli.data.prompts import Prompt
from teal_cli.decoding.decoder import Decoder
from teal_cli.decoding.projector import Rows
from teal_cli.decoding.sampling import Sampling
from teal_cli.runs.job import other_tokens
from teal_cli.store.writer import LevelWriter


class Decoding:
    """Decodes prompts; a `Producer`.

    Args:
        decoders: level name -> decoder under that level's plan.
        prompts: sequence i of each level starts from prompt i.
        max_new_tokens: N tokens give N-1 rows a sequence.
        sampling: shared by all levels; each sequence has its own random stream.
        stop: token ids that end a sequence early.
        prefill: `none`, or `dense` or `sparse` to write rows of the prompts as well, computed so.
    """

    batch = 1
    side_by_side = 1

    def __init__(
        self,
        decoders: Mapping[str, Decoder],
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[int] = (),
        prefill: str = "none",
    ) -> None:
        self._decoders, self._prompts, self._most = decoders, prompts, max_new_tokens
        self._sampling, self._stop, self._prefill = sampling, stop, prefill
        self.sequences = len(prompts)

    def most(self, sequence: int) -> int:
        """Rows that a sequence has at each level, at most."""
        return self._most - 1 + (len(self._prompts[sequence].token_ids) if self._prefill != "none" else 0)

    def write(
        self, levels: Sequence[LevelWriter], sequences: Sequence[int], held: Mapping[str, np.ndarray]
    ) -> Iterator[int]:
        """Decode sequences into a level; see `Producer`."""
        (level,) = levels
        capture, told = _Resumable(level, held[level.name]), 0
        for sequence in sequences:
            for _ in self._decoders[level.name].generate(
                self._prompts[sequence].token_ids,
                max_new_tokens=self._most,
                sampling=self._sampling,
                sequence=sequence,
                stop=self._stop,
                capture=capture,
                dense=0 if self._prefill == "sparse" else None,
                prompt_rows=self._prefill != "none",
            ):
                if capture.written > told:
                    yield capture.written - told
                    told = capture.written


class _Resumable:
    """A capture that lets rows pass which the level already holds, after comparing their tokens."""

    def __init__(self, level: LevelWriter, held: np.ndarray) -> None:
        self._level, self._held = level, held
        self.written = 0
        self._recording = False

    def begin(self, token_id: int, position: int, sequence: int, phase: str = "decode") -> Rows | None:
        self._recording = not len(self._held)
        if self._recording:
            return self._level.begin(token_id, position, sequence, phase)
        if token_id != self._held[0]:
            raise other_tokens(sequence, position)
        self._held = self._held[1:]
        return None

    def end(self) -> None:
        if self._recording:
            self._level.end()
            self.written += 1
