"""Judge a dump by transformers' own model.

transformers is fed the prompt and the very tokens that teal decoded, in one call. Forward pre-hooks on its seven linear
layers leave the prompt's positions dense; at each later one, a decode step of teal's, they note the input, then apply
the mask that is *in the store*: left to threshold for itself, one rounding at a threshold would send the two models
apart for good. What is checked: the next token, the vectors, and the masks.
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
    """Replay one greedy sequence of a level of a store, all positions in one call.

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
        (layer, p): torch.from_numpy(np.ascontiguousarray(level.projection(layer, p)[rows[0] : rows[-1] + 1]))
        for layer in range(model.config.num_hidden_layers)
        for p in PROJECTIONS
    }
    limits = _limits(level, rows, {key: values.shape[1] for key, values in captured.items()})
    with _masked(model, len(prompt), captured, limits, verdict):
        logits = model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    verdict.logit_gap = float((logits.max(1).values - chosen).max())
    _check_experts(verdict, model, level, rows, len(prompt))
    verdict.steps = len(rows)
    return verdict


@contextmanager
def _masked(
    model: PreTrainedModel,
    prompt: int,
    captured: dict[tuple[int, str], Tensor],
    limits: dict[tuple[int, str], Tensor],
    verdict: Verdict,
) -> Iterator[None]:
    """Hooks that compare what each linear layer is given after the prompt with the stored rows, then let only the
    stored entries through."""
    handles = []
    for index, layer in enumerate(model.model.layers):
        for p in PROJECTIONS:

            def hook(
                module: nn.Module,
                inputs: tuple[Tensor],
                rows: Tensor = captured[index, p],
                t: Tensor = limits[index, p],
                where: str = f"layer {index} {p} ({PROJECTION_SITE[p]})",
            ) -> tuple[Tensor]:
                (x,) = inputs
                vectors = x.reshape(-1, rows.shape[1])
                masked = _compare(verdict, vectors[prompt:], rows, t, where)
                return (torch.cat([vectors[:prompt], masked]).reshape(x.shape),)

            handles.append(layer.get_submodule(_MODULES[p]).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _limits(level: Level, rows: np.ndarray, widths: dict[tuple[int, str], int]) -> dict[tuple[int, str], Tensor]:
    """What each entry of the rows is compared with: one threshold for a projection, one for each of a token's experts
    where `down` reads them, one behind the other."""
    limits = {
        (layer, p): torch.tensor(level.thresholds[layer, PROJECTION_INDEX[p]]).expand(len(rows), width)
        for (layer, p), width in widths.items()
    }
    mixture = level.store.header.mixture
    for layer in () if mixture is None else np.flatnonzero(mixture.layers).tolist():
        own = level.expert_thresholds[layer][level.experts(layer)[rows]]
        limits[layer, "down"] = torch.from_numpy(np.repeat(own, widths[layer, "down"] // own.shape[1], axis=1))
    return limits


def _check_experts(verdict: Verdict, model: PreTrainedModel, level: Level, rows: np.ndarray, prompt: int) -> None:
    """The stored experts of the rows against those that transformers has just routed their tokens to."""
    mixture = level.store.header.mixture
    for layer in () if mixture is None else np.flatnonzero(mixture.layers).tolist():
        theirs, ours = model.model.layers[layer].mlp.experts.seen[-1][prompt:].numpy(), level.experts(layer)[rows]
        if not np.array_equal(theirs, ours):
            verdict.trouble.append(f"layer {layer}: experts are {ours.tolist()}, not {theirs.tolist()}")


def _compare(verdict: Verdict, x: Tensor, rows: Tensor, t: Tensor, where: str) -> Tensor:
    """Inputs, stored rows and thresholds, [rows, channels] each; returns the inputs with the stored entries alone."""
    mask = rows != 0
    masked = torch.where(mask, x, 0.0)
    scale = x.norm(dim=1)
    rms = float(((rows - masked).norm(dim=1) / torch.where(scale > 0, scale, 1.0)).max())
    verdict.row_rms = max(verdict.row_rms, rms)
    if not rms < 1e-4:
        verdict.trouble.append(f"{where}: captured row is off by {rms:.2e}")
    differ = (x.abs() > t) != mask
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
