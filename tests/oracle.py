"""Judge a dump by transformers' own model.

transformers is fed the very tokens that teal decoded. In each decode step forward pre-hooks on its seven linear layers
note the input, then apply the masks that are *in the store*: left to threshold for itself, one rounding at a threshold
would send the two models apart for good. What is checked: the next token, the vectors, and the masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from reference_model import unfused
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from teal_cli.data.prompts import PromptSource
from teal_cli.decoding.sampling import Sampling
from teal_cli.model.rope import head_order
from teal_cli.model.weights import Checkpoint
from teal_cli.registry.registry import Registry
from teal_cli.runs.calibrate import Text, calibrate
from teal_cli.runs.dump import Dump, DumpRequest
from teal_cli.runs.session import open_session
from teal_cli.store.reader import Level, open_store
from teal_kernels.packed import PackedMatrix
from teal_kernels.spec import PROJECTION_INDEX, PROJECTION_SITE, PROJECTIONS, SITE_PROJECTIONS
from teal_kernels.steps.spec import MATRICES

_MODULES = {p: f"self_attn.{p}_proj" if p in "qkvo" else f"mlp.{p}_proj" for p in PROJECTIONS}


@dataclass
class Verdict:
    """The largest disagreement of each kind over all steps."""

    steps: int = 0
    logit_gap: float = 0.0
    """How far our token's logit is below the argmax."""
    row_rms: float = 0.0
    """Captured row against the masked input, relative RMS."""
    threshold_distance: float = 0.0
    """Where transformers' |x| > t and the stored mask differ: | |x| - t | / t."""
    disagreements: int = 0
    kept: int = 0
    entries: int = 0
    trouble: list[str] = field(default_factory=list)


def reference_model(path: Path) -> PreTrainedModel:
    """transformers' own float32 model of a checkpoint folder."""
    return unfused(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval())


def dequantised(parent: Path, quantised: Path) -> PreTrainedModel:
    """transformers' own float32 model of the parent, with the weights that the packed rows stand for."""
    model, checkpoint = reference_model(parent), Checkpoint(quantised)
    order = head_order(checkpoint.config)
    for index, layer in enumerate(model.model.layers):
        weights = checkpoint.layer(index, torch.float32)
        for name, site in MATRICES.items():
            matrix = getattr(weights, name)
            assert isinstance(matrix, PackedMatrix)
            for part, columns in zip(SITE_PROJECTIONS[site], matrix.tensor().split(matrix.segments, 1), strict=True):
                if part in "qk" and order is not None:  # back to the checkpoint's order of a head's channels
                    columns = columns.unflatten(1, (-1, len(order)))[:, :, order.argsort()].flatten(1)
                owner = layer.self_attn if part in "qkvo" else layer.mlp
                owner.get_submodule(f"{part}_proj").weight.data.copy_(columns.t())
    model.get_input_embeddings().weight.data.copy_(checkpoint.embedding(torch.float32).tensor())
    if not checkpoint.tied():
        model.get_output_embeddings().weight.data.copy_(checkpoint.lm_head(torch.float32).tensor())
    return model


@torch.no_grad()
def judge(
    model: PreTrainedModel, level: Level, prompt: Sequence[int], tokens: Sequence[int], *, sequence: int = 0
) -> Verdict:
    """Replay one greedy sequence of a level of a store.

    Args:
        model: from `reference_model`.
        level: the level that holds the sequence.
        prompt: the prompt's token ids.
        tokens: the tokens that were fed to the steps, as teal generated them.
        sequence: its index in the level.
    """
    verdict = Verdict()
    rows = np.flatnonzero(level.tokens.sequence == sequence)
    assert list(level.tokens.token_id[rows]) == list(tokens)
    assert list(level.tokens.position[rows]) == list(range(len(prompt), len(prompt) + len(rows)))
    captured = {
        (layer, p): np.asarray(level.projection(layer, p)[rows[0] : rows[-1] + 1])
        for layer in range(model.config.num_hidden_layers)
        for p in PROJECTIONS
    }
    output = model(torch.tensor([list(prompt)]), use_cache=True)
    _check_token(verdict, output.logits[0, -1], tokens[0])
    for step in range(len(rows)):
        row = {key: torch.from_numpy(np.ascontiguousarray(values[step])) for key, values in captured.items()}
        limits = _expert_limits(level, rows[step], {key: len(values) for key, values in row.items()})
        with _masked(model, row, level.thresholds, limits, verdict):
            output = model(torch.tensor([[tokens[step]]]), past_key_values=output.past_key_values, use_cache=True)
        _check_experts(verdict, model, level, rows[step])
        if step + 1 < len(tokens):
            _check_token(verdict, output.logits[0, -1], tokens[step + 1])
        verdict.steps += 1
    return verdict


def _check_token(verdict: Verdict, logits: Tensor, token: int) -> None:
    verdict.logit_gap = max(verdict.logit_gap, float(logits.max() - logits[token]))


@contextmanager
def _masked(
    model: PreTrainedModel,
    rows: dict[tuple[int, str], Tensor],
    thresholds: np.ndarray,
    limits: dict[tuple[int, str], Tensor],
    verdict: Verdict,
) -> Iterator[None]:
    """Hooks that compare each linear layer's input with the stored row, then let only the stored entries through.

    Thresholds are one for a projection, but where `limits` has one for each entry.
    """
    handles = []
    for index, layer in enumerate(model.model.layers):
        for p in PROJECTIONS:
            row, t = rows[index, p], torch.tensor(thresholds[index, PROJECTION_INDEX[p]]).expand_as(rows[index, p])
            if (index, p) in limits:
                t = limits[index, p]

            def hook(
                module: nn.Module,
                inputs: tuple[Tensor],
                row: Tensor = row,
                t: Tensor = t,
                where: str = f"layer {index} {p} ({PROJECTION_SITE[p]})",
            ) -> tuple[Tensor]:
                (x,) = inputs
                return (_compare(verdict, x.reshape(-1), row, t, where).reshape(x.shape),)

            handles.append(layer.get_submodule(_MODULES[p]).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _expert_limits(level: Level, row: int, widths: dict[tuple[int, str], int]) -> dict[tuple[int, str], Tensor]:
    """What each entry that a `down` reads of a token's experts is compared with."""
    mixture, limits = level.store.header.mixture, {}
    for layer in () if mixture is None else np.flatnonzero(mixture.layers).tolist():
        own = level.expert_thresholds[layer][level.experts(layer)[row]]
        limits[layer, "down"] = torch.from_numpy(np.repeat(own, widths[layer, "down"] // len(own)))
    return limits


def _check_experts(verdict: Verdict, model: PreTrainedModel, level: Level, row: int) -> None:
    """The stored experts of a row against those that transformers routed its token to, in the step it has just done."""
    mixture = level.store.header.mixture
    for layer in () if mixture is None else np.flatnonzero(mixture.layers).tolist():
        theirs = model.model.layers[layer].mlp.experts.seen[-1][0].tolist()
        if level.experts(layer)[row].tolist() != theirs:
            verdict.trouble.append(f"layer {layer}: experts are {level.experts(layer)[row]}, not {theirs}")


def _compare(verdict: Verdict, x: Tensor, row: Tensor, t: Tensor, where: str) -> Tensor:
    mask = row != 0
    masked = torch.where(mask, x, 0.0)
    scale = float(x.norm())
    rms = float((row - masked).norm()) / scale if scale else float(row.norm())
    verdict.row_rms = max(verdict.row_rms, rms)
    if not rms < 1e-4:
        verdict.trouble.append(f"{where}: captured row is off by {rms:.2e}")
    own = x.abs() > t
    differ = own != mask
    verdict.kept += int(mask.sum())
    verdict.entries += mask.numel()
    if differ.any():
        distance = float(((x[differ].abs() - t[differ]).abs() / t[differ].clamp_min(1e-30)).max())
        verdict.disagreements += int(differ.sum())
        verdict.threshold_distance = max(verdict.threshold_distance, distance)
        if not distance < 1e-4:
            verdict.trouble.append(f"{where}: mask differs {distance:.2e} (relative) from the threshold")
    return masked


def calibrated(name: str, sequences: int, seq_len: int) -> None:
    """Calibrate a registered model in float32."""
    text = Text("python-docs", num_sequences=sequences, seq_len=seq_len)
    for _ in calibrate(Registry(), name, text, dtype="float32", device=torch.device("cpu")):
        pass


def prompt_file(folder: Path, *prompts: str) -> Path:
    """A file with one prompt a line."""
    file = folder / "prompts.txt"
    file.write_text("\n".join(prompts))
    return file


def make_dump(
    model: str,
    path: Path,
    *,
    levels: tuple[float, ...],
    prompts: Path,
    max_new_tokens: int,
    backend: str,
    device: str = "cpu",
) -> Dump:
    """A greedy float32 dump of a registered, calibrated model through the library calls of `teal dump`."""
    session = open_session(model, dtype="float32", device=device, backend=backend)
    request = DumpRequest(levels, PromptSource(file=prompts), max_new_tokens, Sampling(temperature=0), ignore_eos=True)
    dump = Dump(session, request)
    for _ in dump.run(path):
        pass
    return dump


def assert_agrees(dump: Dump, path: Path, reference: PreTrainedModel | None = None) -> None:
    """Every sequence of every level of a dump, by the limits that teal promises; by the model's own checkpoint, or by a
    reference that is given."""
    reference = reference or reference_model(dump.session.entry.path)
    for target in dump.request.levels:
        level = open_store(path).level(target)
        kept = entries = 0
        for index, prompt in enumerate(dump.prompts):
            rows = level.rows(index)
            # What was generated: the tokens that were fed, and the last one, which no step was fed any more.
            tokens = [int(token) for token in level.tokens.token_id[rows]]
            verdict = judge(reference, level, prompt.token_ids, tokens, sequence=index)
            assert verdict.steps == dump.request.max_new_tokens - 1
            assert verdict.logit_gap < 1e-3
            assert not verdict.trouble, verdict.trouble[:5]
            kept, entries = kept + verdict.kept, entries + verdict.entries
        assert abs(1 - kept / entries - target) < 0.2, "the masks are nowhere near the level they are filed under"
