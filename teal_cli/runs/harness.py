"""A model under a plan as lm-evaluation-harness sees it: `--model teal --model_args model=NAME,plan=NAME`.

Requests are tokenised, windowed and cut as the harness's own `hf` model does it, so that results stand beside published
ones. Scores come from the pass and texts from the decoder: a position is dense or sparse exactly as decoding has it.
Nothing here knows tasks. Imported only where lm_eval is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from teal_cli.data.tokenizer import TextStream
from teal_cli.data.windows import token_before
from teal_cli.decoding.sampling import Sampling
from teal_cli.errors import UsageError
from teal_cli.passes.forward import Sparse, States, forward
from teal_cli.passes.judge import realised_bytes
from teal_cli.passes.layers import ResidentLayers
from teal_cli.passes.score import log_probabilities
from teal_cli.runs.evaluate import DEFAULT_SPARSE_FROM, parse_sparse_from
from teal_cli.runs.session import open_session
from teal_kernels.spec import PROJECTIONS

_LOG = logging.getLogger(__name__)
_NEW_TOKENS: Final = 256
"""Of a request that does not say how many, as in the harness's `hf`."""
_KNOWN: Final = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


@register_model("teal")
class TealLM(TemplateLM):
    """One model of the registry under one plan.

    Args:
        model: as `Registry.get` takes it; None is the default model.
        sparsity: target of a uniform plan; 0, where there is no plan either, is the dense model.
        plan: name of a plan of the model.
        sparse_from: where a sequence becomes sparse, as `teal eval --sparse-from`: a number of tokens, `half`, or a
            share of it. None is what decoding does: the context of a request is dense, what follows it sparse. A text
            that is scored as a whole (`loglikelihood_rolling`) has no context; it is sparse from where `teal eval` has
            it.
        calibration, dtype, backend: as `open_session` takes them.
        device: as `open_session` takes it. The harness gives `cuda:0` where nothing was asked for, so a GPU that is not
            there means the CPU here, as in its `hf`.
        max_length: tokens of context, at most the model's; longer requests are cut on the left.
        seed: of the draws of requests that want sampling.
        batch_size, max_batch_size: given by the harness; a batch is one sequence here.

    Raises:
        UsageError: sparsity and plan together, no position, a plan of another model.
        NotFoundError, HardwareError, TealError: as `open_session` and `Session.levels`.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        sparsity: float | None = None,
        plan: str | None = None,
        sparse_from: str | float | None = None,
        calibration: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        backend: str | None = None,
        max_length: int | None = None,
        seed: int = 0,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self._sparse_from = None if sparse_from is None else parse_sparse_from(str(sparse_from))
        if (device or "").startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"
        self.session = open_session(model, dtype=dtype, device=device, backend=backend, calibration=calibration)
        sparsities = () if plan is not None and sparsity is None else (float(sparsity or 0),)
        (self.level,) = self.session.levels(sparsities, (plan,) if plan is not None else ())
        for note in self.session.notes:
            _LOG.warning(note)
        self.tokenizer = self.session.tokenizer
        self.max_length = min(int(max_length or self.session.config.context), self.session.config.context)
        self._seed = seed
        self._layers = ResidentLayers(self.session.model)
        self._head = self._layers.open_head()
        self._decoder = self.session.decoder(self.level.plan, self.session.cache(self.max_length))
        self._kept = np.zeros((self.session.config.layers, len(PROJECTIONS)), np.int64)
        self._rows = self._sparse_rows = 0

    # ---------------------------------------------------------------- what the harness asks about a model
    @property
    def eot_token_id(self) -> int:
        return token_before(self.tokenizer) if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return token_before(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return self.session.entry.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; a text that begins with the begin-of-sequence token does not get a second one."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **given))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not self.tokenizer.chat_template:
            raise UsageError(f"{self.tokenizer_name} has no chat template", hint="leave out --apply_chat_template")
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def get_model_info(self) -> dict[str, Any]:
        """What stands in the harness's results beside the scores."""
        plan = self.level.plan
        return {
            "teal_model": self.session.entry.name,
            "teal_plan": self.level.name,
            "teal_calibration": plan.calibration,
            "teal_target": plan.target,
            "teal_sparse_from": "prompt" if self._sparse_from is None else self._sparse_from,
            "teal_scored_rows": self._rows,
            "teal_sparse_rows": self._sparse_rows,
            "teal_realised": realised_bytes(self.session.config, self._kept, self._sparse_rows)
            if self._sparse_rows
            else 0.0,
            "model_dtype": self.session.dtype,
        }

    # ---------------------------------------------------------------- scores
    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _texts, context, continuation in requests]
        found: list[tuple[float, bool] | None] = [None] * len(pairs)
        for number, answer in self._score(pairs, prompted=True, quiet=disable_tqdm):
            found[number] = answer
            self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
        if pairs and self.level.plan.target and not self._sparse_rows:
            _LOG.warning(
                "nothing was sparse: every answer is one token, which a dense context predicts; "
                "--model_args sparse_from=half makes contexts sparse too"
            )
        return [answer for answer in found if answer is not None]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows as long as the context that do not overlap."""
        pairs: list[tuple[list[int], list[int]]] = []
        texts: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, windows):
                pairs.append(window)
                texts.append(number)
        sums = [0.0] * len(requests)
        for number, (value, _) in self._score(pairs, prompted=False, quiet=disable_tqdm):
            sums[texts[number]] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], *, prompted: bool, quiet: bool
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """(index, (log-likelihood, whether it is what greedy decoding gives)) of each pair of context and continuation.

        Pairs that differ in their last token alone, as the choices of many tasks do, are run once.
        """
        groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for number, (context, continuation) in enumerate(pairs):
            inputs = tuple([*context, *continuation][-(self.max_length + 1) : -1])
            start = self._start(len(inputs), len(inputs) - len(continuation) + 1 if prompted else None)
            groups.setdefault((inputs, start), []).append(number)
        bar = tqdm(total=len(pairs), disable=quiet, desc="Running loglikelihood requests")
        for (inputs, start), numbers in groups.items():
            states = self._run(np.array(inputs, np.int64), start)
            for number in numbers:
                targets = torch.tensor(pairs[number][1], device=self._layers.device)
                best = torch.zeros_like(targets)
                scores = log_probabilities(
                    self._head, self.session.config.vocab, states[len(states) - len(targets) :], targets, best
                )
                yield number, (float(scores.double().sum()), bool((best == targets).all()))
                bar.update()
        bar.close()

    def _start(self, length: int, prompt: int | None) -> int:
        """Position of the first sparse row of a sequence, of which the first `prompt` tokens are its context."""
        if self._sparse_from is None and prompt is not None:
            return min(max(prompt, 0), length)
        wanted = parse_sparse_from(DEFAULT_SPARSE_FROM) if self._sparse_from is None else self._sparse_from
        return Sparse(self.level.plan, wanted).position(length)

    def _run(self, tokens: np.ndarray[Any, np.dtype[np.int64]], start: int) -> torch.Tensor:
        """Hidden states [S, hidden] after the last layer, sparse from `start` on."""
        dense = self.level.plan.target == 0
        variants = [] if dense else [Sparse(self.level.plan, start, self._kept)]
        found: list[torch.Tensor] = []

        def sink(_: int, states: States) -> None:
            found.append(torch.cat([states.dense[:start], *states.sparse]) if states.sparse else states.dense)

        for _ in forward(self._layers, [tokens], variants, dense_rows=dense, sink=sink):
            pass
        self._rows += len(tokens)
        self._sparse_rows += 0 if dense else len(tokens) - start
        return found[0]

    # ---------------------------------------------------------------- texts
    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Decode each context until a stop string, an end-of-sequence token or the wanted number of tokens."""
        texts = []
        for number, request in enumerate(tqdm(requests, disable=disable_tqdm, desc="Running generate_until requests")):
            context, given = request.args
            texts.append(self._generate(number, context, given))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _generate(self, number: int, context: str, given: dict[str, Any]) -> str:
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(given, _NEW_TOKENS))
        if unknown := sorted(set(wanted) - _KNOWN):
            raise UsageError(
                f"teal cannot generate with {', '.join(unknown)}",
                hint=f"it knows {', '.join(sorted(_KNOWN))}; change the task, or --gen_kwargs",
            )
        count, until = wanted["max_gen_toks"], handle_stop_sequences(wanted["until"], eos=None)
        if count >= self.max_length:
            raise UsageError(
                f"{count} new tokens leave no room for a prompt in {self.max_length}",
                hint="lower max_gen_toks with --gen_kwargs, or raise max_length in --model_args",
            )
        prompt = self.tok_encode(context)[-(self.max_length - count) :]
        sampling = Sampling(0.0, seed=self._seed)
        if wanted.get("do_sample"):
            drawn = float(wanted.get("temperature", 1.0)), int(wanted.get("top_k", 0)), float(wanted.get("top_p", 1.0))
            sampling = Sampling(*drawn, seed=self._seed)
        stream, ids, text = TextStream(self.tokenizer), [], ""
        for token in self._decoder.generate(
            prompt,
            max_new_tokens=count,
            sampling=sampling,
            sequence=number,
            stop=self.session.config.eos_ids,
            dense=self._start(len(prompt), len(prompt)),
        ):
            ids.append(token)
            text += stream.push(token)
            if any(term and term in text for term in until):
                break
        return postprocess_generated_text(self.tokenizer.decode(ids, skip_special_tokens=True), until, None)
