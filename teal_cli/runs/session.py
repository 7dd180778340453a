"""Everything a command needs to decode, opened as one thing: model, tokenizer, calibration, device, kernels.

A session is opened once and gives a decoder for each plan that is asked of it; all share the weights and one key/value
cache. Commands stay free of the question of where things come from, and tests open the same sessions as commands.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch

from teal_cli.data.prompts import is_text
from teal_cli.data.tokenizer import load_tokenizer
from teal_cli.decoding.decoder import Decoder
from teal_cli.decoding.steps import check_step, choose_step, open_step
from teal_cli.errors import HardwareError, TealError, UsageError, counted
from teal_cli.model.config import ModelConfig, load_config
from teal_cli.model.transformer import KVCache, Transformer
from teal_cli.model.weights import Checkpoint
from teal_cli.passes.layers import Layers, ResidentLayers, StreamedLayers, fits
from teal_cli.registry.calibrations import remarks
from teal_cli.registry.registry import ModelEntry, Registry
from teal_cli.runs.plans import Level, levels_of
from teal_cli.sparsity.calibration import Calibration, check_fits
from teal_cli.sparsity.plan import Plan, dense_plan, uniform_plan
from teal_kernels.backends import BackendError
from teal_kernels.thresholds import Thresholds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class Session:
    """An opened model; make one with `open_session`.

    Attributes:
        entry: the model in the registry.
        config: what its config.json says.
        dtype: bfloat16, float16 or float32, to compute in. device: to compute on.
        backend: what runs the sparse products.
        calibration_name: which calibration to take thresholds from; None takes the model's default.
        notes: remarks for the user, e.g. a calibration made in another dtype.
        load_s: seconds that reading the weights took.
        layer_by_layer: what `layers` are: one in memory at a time, or all; None: all where they fit.
    """

    entry: ModelEntry
    config: ModelConfig
    dtype: str
    device: torch.device
    backend: str
    calibration_name: str | None
    notes: list[str] = field(default_factory=list)
    load_s: float = 0.0
    layer_by_layer: bool | None = False

    @cached_property
    def model(self) -> Transformer:
        """The weights on the device, read on first use; raises as `Transformer.from_checkpoint`."""
        return self.load()

    def load(self, progress: Callable[[int, int], None] | None = None) -> Transformer:
        """Read the weights, where that has not been done.

        Args:
            progress: called with (layers loaded, layers).

        Raises:
            TealError: the checkpoint is damaged.
        """
        if "model" not in self.__dict__:
            start = time.perf_counter()
            self.model = Transformer.from_checkpoint(self.entry.path, DTYPES[self.dtype], self.device, progress)
            self.load_s = time.perf_counter() - start
        return self.model

    @cached_property
    def layers(self) -> Layers:
        """The model as a pass takes it; what decodes takes `model`."""
        if self.streams:
            return StreamedLayers(Checkpoint(self.entry.path), DTYPES[self.dtype], self.device)
        return ResidentLayers(self.model)

    @cached_property
    def streams(self) -> bool:
        """Whether `layers` are in memory one at a time."""
        if self.layer_by_layer is not None:
            return self.layer_by_layer
        streams = not fits(Checkpoint(self.entry.path), DTYPES[self.dtype], self.device)
        if streams:
            self.notes.append(f"{self.entry.name} does not fit the memory that is free: one layer is there at a time")
        return streams

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's tokenizer, loaded on first use."""
        return load_tokenizer(self.entry.path)

    @cached_property
    def calibration(self) -> Calibration:
        """The calibration, loaded on first use and checked against the model.

        Raises:
            NotFoundError: there is none, or none of that name.
            UsageError: it belongs to another model.
        """
        calibration = Calibration.load(Registry().find_calibration(self.entry.name, self.calibration_name))
        self.notes += remarks(self.entry, self.calibration_name)
        self.notes += check_fits(calibration, self.config, self.entry.path, self.dtype)
        return calibration

    def plan(self, sparsity: float) -> Plan:
        """The uniform plan for a target; at 0 no calibration is needed."""
        if sparsity == 0:
            return dense_plan(self.config.layers)
        return uniform_plan(self.calibration, sparsity)

    def levels(self, sparsities: Sequence[float], plans: Sequence[str] = ()) -> tuple[Level, ...]:
        """Uniform plans for targets, or plans of the model by their names; raises as `levels_of`."""
        calibration = self.calibration if any(sparsities) and not plans else None
        return levels_of(self.entry, self.config.layers, sparsities, plans, calibration)

    def thresholds(self, plan: Plan) -> Thresholds | None:
        """What a decoder applies; None for the dense path.

        A negative threshold, which an imported calibration of TEAL can give, drops nothing; 0 drops zeros only, which
        is the same product.
        """
        return None if plan.target == 0 else plan.applied()

    def cache(self, tokens: int) -> KVCache:
        """A key/value cache for that many tokens, but never more than the context."""
        return self.model.cache(min(tokens, self.config.context))

    def decoder(self, plan: Plan, cache: KVCache) -> Decoder:
        """A decoder under a plan; decoders of one session may share a cache, one sequence at a time.

        Raises:
            HardwareError: the backend cannot run the plan's criterion.
        """
        self.check_decodes(plan)
        step = open_step(self.model, cache, self.thresholds(plan), self.backend, plan.target)
        return Decoder(self.model, cache, step)

    def check_decodes(self, *plans: Plan) -> None:
        """Refuse, before weights are read, plans that no decoder could be made for.

        Raises:
            HardwareError: the backend cannot run the criterion of one.
        """
        try:
            for plan in plans:
                check_step(self.thresholds(plan), self.backend)
        except BackendError as error:
            raise HardwareError(str(error), hint="choose another with --backend") from None

    def encode(self, text: str, *, chat: bool = False) -> list[int]:
        """Token ids of a prompt; with `chat`, as a user's message in the model's chat template.

        Raises:
            UsageError: the model has no chat template, or the text is none.
            TealError: the template fails, or the tokenizer belongs to another model.
        """
        if chat:
            return self.encode_chat([{"role": "user", "content": text}])
        _check_text(text)
        return self._known(self.tokenizer(text).input_ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation in the model's chat template, up to where the model's answer begins.

        Args:
            messages: each a `role` (system, user, assistant) and its `content`.

        Raises: as `encode`.
        """
        for message in messages:
            _check_text(message["content"])
        check_template(self.entry.name, self.tokenizer)
        try:
            encoded: Any = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, return_dict=True
            )
        except Exception as error:  # a template is a foreign program: its sandbox stops it with whatever comes
            raise TealError(
                f"the chat template of {self.entry.name} fails: {type(error).__name__}: {error}",
                hint="`teal generate` without --chat takes the text as it is; or download the model again",
            ) from error
        return self._known(encoded["input_ids"])

    def _known(self, token_ids: Sequence[int]) -> list[int]:
        """Token ids of the tokenizer, which must be rows of the model's embedding."""
        beyond = [token for token in token_ids if not 0 <= token < self.config.vocab]
        if beyond:
            raise TealError(
                f"the tokenizer of {self.entry.name} gives the token {beyond[0]}; the model has {self.config.vocab}",
                hint="download the model again: its tokenizer belongs to another one",
            )
        return list(token_ids)

    def decode(self, token_ids: list[int]) -> str:
        """Text of token ids, special tokens included."""
        return str(self.tokenizer.decode(token_ids))


def check_template(model: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a model that was not made to converse, by its name and tokenizer.

    Raises:
        UsageError: it has no chat template.
    """
    if not tokenizer.chat_template:
        raise UsageError(
            f"{model} has no chat template: it continues text, and was not trained to converse",
            hint=f"`teal generate -m {model}` without --chat continues text; to converse, take an instruct model",
        )


def _check_text(text: str) -> None:
    if not is_text(text):
        raise UsageError("the prompt is no text: it holds half of a surrogate pair", hint="give it as UTF-8")


def open_session(
    model: str | None = None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    backend: str | None = None,
    calibration: str | None = None,
    load: bool = True,
) -> Session:
    """Open a model of the registry.

    Args:
        model: a name as `Registry.get` takes it; None is the default model.
        dtype: bfloat16, float16 or float32; None takes the checkpoint's own.
        device: "cpu", "cuda", "cuda:1"; None or "auto" takes a GPU where there is one.
        backend: as `choose_step` takes it; None or "auto" takes the fastest that works on the device.
        calibration: id or folder; None takes the model's default.
        load: read the weights now; otherwise `Session.load` or the first use does, so that whatever else may be wrong
            is told before.

    Raises:
        NotFoundError: no such model.
        HardwareError: the device is not there, or the backend cannot run on it.
        TealError: the checkpoint is damaged or of an architecture that teal does not run.
    """
    _survive_forks()
    entry = Registry().get(model)
    where, config = choose_device(device), load_config(entry.path)
    requested = None if backend in (None, "auto") else backend
    try:
        chosen, slower = choose_step(where, requested, mixture=config.mixture is not None)
    except BackendError as error:
        hint = "`teal doctor` shows what this machine can run; --backend auto takes what works"
        raise HardwareError(str(error), hint=hint) from None
    notes = [f"decoding with the {chosen} backend, which is slower: {slower}"] if slower else []
    session = Session(entry, config, dtype or config.torch_dtype, where, chosen, calibration, notes)
    if load:
        session.load()
    return session


@cache
def _survive_forks() -> None:
    """In processes forked from this one torch computes on one thread: its others are not there to be waited for."""
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def choose_device(device: str | None) -> torch.device:
    """The device to run on; None and "auto" take the GPU of this rank, or the first, or else the CPU.

    Raises:
        HardwareError: a GPU was asked for and is not there.
    """
    if device in (None, "auto"):
        rank = os.environ.get("LOCAL_RANK", "")  # torchrun sets it
        gpu = (
            f"cuda:{int(rank) % torch.cuda.device_count()}" if rank.isdigit() and torch.cuda.is_available() else "cuda"
        )
        return torch.device(gpu if torch.cuda.is_available() else "cpu")
    where = torch.device(device)
    if where.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (where.index or 0) >= count:
            raise HardwareError(
                f"there is no device {device}: PyTorch sees {counted(count, 'GPU')} here",
                hint="leave out --device, or see `teal doctor`",
            )
    return where
