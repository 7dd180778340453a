"""Everything that decodes in `teal bench decode`: our decoder, a plain PyTorch loop, transformers, llama.cpp.

An engine continues the prompt greedily by a number of tokens and says how long one decode step took; prefill and the
token it gives are never in a time. Every engine can say which tokens it chose, so that a check can hold them against
our dense model.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from teal_cli.bench.subjects import Subject
from teal_cli.decoding.decoder import Capture, Decoder
from teal_cli.decoding.sampling import Sampling
from teal_cli.decoding.steps import PlainStep, open_step
from teal_cli.errors import HardwareError, NotFoundError, TealError
from teal_cli.model.transformer import KVCache
from teal_cli.store.writer import LevelHeader, StoreHeader, StoreWriter
from teal_kernels.spec import SITES

_UNTIL_BUSY = 0.1
"""Seconds after which a Python that was started runs its loop."""

GREEDY = Sampling(temperature=0.0, top_k=0, seed=0)


class Engine(Protocol):
    """One way to decode.

    Attributes:
        name: what the user sees. backend: what ran the step. weights: kind of its matrices, see `DecodeRow`.
        sparsity: target; 0 for dense.
        tokens: new ids of the last run.
    """

    name: str
    backend: str
    weights: str
    sparsity: float
    tokens: list[int]

    def seconds(self) -> float:
        """Decode once; seconds per step."""
        ...

    def kept(self) -> NDArray[np.float64] | None:
        """Kept entries of a mean step, [layers, 7]; None for a dense engine."""
        ...

    def weight_bytes(self) -> int | None:
        """Bytes of weights that a step reads, where they are not those of our model."""
        ...


class _DenseEngine:
    """What dense engines have in common."""

    sparsity = 0.0

    def kept(self) -> NDArray[np.float64] | None:
        return None

    def weight_bytes(self) -> int | None:
        return None


class Teal:
    """Our decoder at one sparsity; with `plain`, dense as a loop of PyTorch operators."""

    def __init__(
        self, subject: Subject, cache: KVCache, sparsity: float, new_tokens: int, *, plain: bool = False
    ) -> None:
        thresholds = subject.thresholds[sparsity]
        model = subject.model
        step = (
            PlainStep(model, cache, None, "")
            if plain
            else open_step(model, cache, thresholds, subject.backend, sparsity)
        )
        self.name = "torch" if plain else "teal"
        self.backend, self.weights, self.sparsity = step.backend, subject.weights, sparsity
        self.decoder = Decoder(model, cache, step)
        self.tokens: list[int] = []
        self._prompt, self._new_tokens = subject.prompt, new_tokens

    def kept(self) -> NDArray[np.float64] | None:
        return self.decoder.mean_kept()

    def weight_bytes(self) -> int | None:
        return None

    def seconds(self, capture: Capture | None = None) -> float:
        tally = self.decoder.tally
        steps, spent = tally.steps, tally.decode_s
        self.tokens = list(
            self.decoder.generate(self._prompt, max_new_tokens=self._new_tokens, sampling=GREEDY, capture=capture)
        )
        return (tally.decode_s - spent) / (tally.steps - steps)


class Dumping:
    """Our decoder with a dump: into a store of its own each time, until all of it is committed to disk."""

    def __init__(self, subject: Subject, engine: Teal, new_tokens: int) -> None:
        self.name, self.backend, self.weights, self.sparsity = "teal", engine.backend, engine.weights, engine.sparsity
        self.tokens: list[int] = []
        self._engine, self._steps, self._device = engine, new_tokens - 1, str(subject.model.device)
        self._header = store_header(subject)
        thresholds = subject.thresholds[engine.sparsity]
        table = np.zeros((subject.config.layers, 7), np.float32) if thresholds is None else thresholds.table
        self._level = LevelHeader(engine.sparsity, "uniform", table, self._steps)

    def seconds(self) -> float:
        folder = Path(tempfile.mkdtemp(prefix="teal-bench-"))
        try:
            with StoreWriter.create(folder / "s.zarr", self._header, [self._level], device=self._device) as writer:
                level = writer.level(self.sparsity)
                per_step = self._engine.seconds(level)
                start = time.perf_counter()
                level.finish()
                drained = time.perf_counter() - start
                if level.rows != self._steps:
                    raise TealError(f"the dump has {level.rows} rows of {self._steps}")
                writer.complete()
        finally:
            shutil.rmtree(folder)
        self.tokens = self._engine.tokens
        return per_step + drained / self._steps

    def kept(self) -> NDArray[np.float64] | None:
        return self._engine.kept()

    def weight_bytes(self) -> int | None:
        return None


class Busy:
    """An engine beside processes that each keep a core busy. They live while it is timed."""

    def __init__(self, engine: Engine, processes: int) -> None:
        self.name, self.backend, self.weights = engine.name, engine.backend, engine.weights
        self.sparsity, self.tokens = engine.sparsity, engine.tokens
        self._engine, self.processes = engine, processes

    def seconds(self) -> float:
        command = [sys.executable, "-S", "-c", "while True: pass"]
        others = [subprocess.Popen(command, stdin=subprocess.DEVNULL) for _ in range(self.processes)]
        try:
            time.sleep(_UNTIL_BUSY)
            taken = self._engine.seconds()
        finally:
            for other in others:
                other.kill()
                other.wait()
        self.tokens = self._engine.tokens
        return taken

    def kept(self) -> NDArray[np.float64] | None:
        return self._engine.kept()

    def weight_bytes(self) -> int | None:
        return self._engine.weight_bytes()


def store_header(subject: Subject) -> StoreHeader:
    """Of the temporary store; nobody reads it."""
    config = subject.config
    return StoreHeader(
        model=subject.name, model_revision=None, config_sha256="benchmark", calibration=None, dtype=subject.dtype,
        prompts={"source": "benchmark"}, seed=0, sampling=asdict(GREEDY), backend=subject.backend,
        layers=config.layers, channels={site: config.channels(site) for site in SITES},
    )  # fmt: skip


class Transformers(_DenseEngine):
    """`generate` of transformers, on the same checkpoint, dtype and device."""

    name = "transformers"

    def __init__(self, subject: Subject, new_tokens: int) -> None:
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        assert subject.checkpoint is not None
        self._model = AutoModelForCausalLM.from_pretrained(
            subject.checkpoint, dtype=subject.model.dtype, local_files_only=True
        ).to(subject.model.device)
        self.backend, self.weights = str(self._model.config._attn_implementation), subject.dtype
        self.tokens: list[int] = []
        self._prompt = torch.tensor([subject.prompt], device=subject.model.device)
        # No end of sequence, as in the other engines; pad is asked for and unused.
        self._model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)

    @torch.inference_mode()
    def seconds(self) -> float:
        stamps = _Stamps()
        out = self._model.generate(self._prompt, attention_mask=torch.ones_like(self._prompt), streamer=stamps)
        self.tokens = out[0, self._prompt.shape[1] :].tolist()
        return stamps.per_step()

    @torch.inference_mode()
    def read_prompt(self) -> int:
        """The most likely token after the prompt."""
        return int(self._model(self._prompt, logits_to_keep=1).logits[0, -1].argmax())


class _Stamps:
    """A streamer that notes when each token comes."""

    def __init__(self) -> None:
        self._at: list[float] = []

    def put(self, value: Any) -> None:
        self._at.append(time.perf_counter())

    def end(self) -> None:
        pass

    def per_step(self) -> float:
        """The prompt is put first, then every token; steps are those after the first token."""
        return (self._at[-1] - self._at[1]) / (len(self._at) - 2)


class LlamaCpp(_DenseEngine):
    """llama.cpp through its Python binding, on a GGUF of the same model, with as many threads as torch."""

    def __init__(self, subject: Subject, file: Path, new_tokens: int) -> None:
        import llama_cpp

        on_gpu = subject.model.device.type == "cuda"
        if on_gpu and not llama_cpp.llama_supports_gpu_offload():
            raise HardwareError("this llama.cpp was built without a GPU", hint="leave out --gguf, or use --device cpu")
        threads = torch.get_num_threads()

        def open_file(**options: Any) -> Any:
            try:
                return llama_cpp.Llama(
                    str(file), n_threads=threads, n_threads_batch=threads, n_gpu_layers=-1 if on_gpu else 0,
                    verbose=False, **options,
                )  # fmt: skip
            except ValueError as error:
                raise TealError(f"llama.cpp cannot load {file}: {error}", hint="is it a GGUF of this model?") from None

        self._open = open_file
        self._scoring: Any = None
        self._llama = open_file(n_ctx=len(subject.prompt) + new_tokens)
        if self._llama.n_vocab() != subject.config.vocab:
            raise TealError(
                f"{file} has {self._llama.n_vocab()} tokens and {subject.name} has {subject.config.vocab}",
                hint="give a GGUF of the same model",
            )
        self.name = f"llama.cpp {file.name}"
        self.backend = "GPU" if on_gpu else "CPU"
        self.tokens: list[int] = []
        self._weight_bytes, self.weights = gguf_bytes(file), gguf_type(file)
        self._prompt, self._new_tokens = list(subject.prompt), new_tokens

    def seconds(self) -> float:
        self.tokens = []
        start = end = 0.0
        for token in self._llama.generate(self._prompt, temp=0.0):
            end = time.perf_counter()
            start = start or end
            self.tokens.append(int(token))
            if len(self.tokens) == self._new_tokens:
                break
        return (end - start) / (self._new_tokens - 1)

    def weight_bytes(self) -> int | None:
        return self._weight_bytes

    def read_prompt(self) -> int:
        """The most likely token after the prompt, which is read anew."""
        self._llama.reset()
        return int(next(self._llama.generate(self._prompt, temp=0.0)))

    def log_probabilities(self, inputs: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.float64]:
        """Log-probability of each target, the tokens that follow the last inputs; float64 [T], in nats."""
        if self._scoring is None:
            self._scoring = self._open(n_ctx=len(inputs), logits_all=True)
        self._scoring.reset()
        self._scoring.eval(inputs.tolist())
        logits = torch.from_numpy(np.asarray(self._scoring.scores[len(inputs) - len(targets) : len(inputs)])).double()
        chosen = torch.from_numpy(targets)[:, None]
        found: NDArray[np.float64] = logits.log_softmax(-1).gather(1, chosen)[:, 0].numpy()
        return found


def check_gguf(files: list[Path]) -> None:
    """Refuse what cannot be measured before anything is loaded.

    Raises:
        HardwareError: llama.cpp's binding is not installed.
        NotFoundError: no such file.
    """
    import importlib.util

    if files and importlib.util.find_spec("llama_cpp") is None:
        raise HardwareError(
            "llama.cpp is not installed, so there is nothing to run a GGUF with",
            hint="pip install 'teal-cli[bench]', which builds it, or leave out --gguf",
        )
    for file in files:
        if not file.is_file():
            raise NotFoundError(f"there is no file {file}", hint="--gguf takes a GGUF of the model that is measured")


def gguf_type(file: Path) -> str:
    """The type of most weights of a GGUF, as llama.cpp calls it, in small letters: f16, q8_0, q4_0."""
    from gguf import GGUFReader

    sizes: Counter[str] = Counter()
    for tensor in GGUFReader(file).tensors:
        sizes[tensor.tensor_type.name.lower()] += int(tensor.n_elements)
    return sizes.most_common(1)[0][0]


def bits_of(weights: str) -> int:
    """Bits of a weight, without its scales: 16 of bfloat16 and f16, 4 of int4 and q4_1."""
    return int(re.sub(r"^[a-z]+", "", weights).split("_")[0])


def gguf_bytes(file: Path) -> int:
    """Bytes of weights that a step reads from a GGUF: all but an embedding that is not the head as well."""
    from gguf import GGUFReader

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(file).tensors}
    return sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)
