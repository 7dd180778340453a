"""From a GGUF's vocabulary to tokenizer.json and tokenizer_config.json.

A GGUF does not carry its pre-tokenizer: it names it, and llama.cpp holds the regular expressions. The names
of the supported families are listed here with the Hugging Face pre-tokenizer they stand for; an unknown name
is refused, since a near miss would tokenize numbers or spaces differently and nobody would notice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from teal_cli.errors import UsageError
from teal_cli.files import write_json
from teal_cli.registry.convert.reader import GgufFile, damaged

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # tokenizer.ggml.token_type
_SPACE: Final = "▁"

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Pre:
    """How text is cut before byte-pair merging: by a regex, or by GPT-2's own, digits apart."""

    regex: str | None = None
    nfc: bool = False
    ignore_merges: bool = False  # a whole piece that is in the vocabulary is taken as it is

    def build(self) -> Any:
        if self.regex is None:
            return pre_tokenizers.Sequence([
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ])  # fmt: skip
        return pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(self.regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip


_LLAMA3 = _Pre(_WORDS % "{1,3}", ignore_merges=True)
_QWEN2 = _Pre(_WORDS % "", nfc=True)
_PRE: Final[dict[str, _Pre]] = {
    "smollm": _Pre(),
    "refact": _Pre(),  # Granite 3
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3,  # SmolLM3
    "dbrx": _Pre(_WORDS % "{1,3}"),  # OLMo 2, Phi-4
    "gpt-4o": _Pre(_O200K),  # Phi-4-mini
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _Pre(_TEKKEN, ignore_merges=True),
}


def write_tokenizer(gguf: GgufFile, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json (with the chat template) into `folder`.

    Raises:
        UsageError: a kind of vocabulary or a pre-tokenizer that is not known here.
        TealError: the vocabulary is missing or does not fit its scores and merges.
    """
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise damaged(gguf.path, "it carries no vocabulary (tokenizer.ggml.tokens)")
    kinds = gguf.metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    model = gguf.metadata.get("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer = _byte_level(gguf, tokens)
    elif model == "llama":
        tokenizer = _sentencepiece(gguf, tokens, kinds)
    else:
        raise UsageError(
            f"{gguf.path.name} has a vocabulary of kind {model!r}, which teal cannot convert",
            hint="supported are gpt2 (byte-level BPE) and llama (SentencePiece BPE)",
        )
    tokenizer.add_special_tokens([
        AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL
    ])  # fmt: skip
    tokenizer.add_tokens([
        AddedToken(token, special=False, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED
    ])  # fmt: skip
    named = _named_tokens(gguf, tokens)
    tokenizer.post_processor = _post_processor(gguf, named, tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    # transformers rebuilds some families' tokenizers from their class; the generic class takes tokenizer.json
    # as it is
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": int(gguf.require("context_length")),
        "clean_up_tokenization_spaces": False,
    }
    template = gguf.metadata.get("tokenizer.chat_template")
    if template:
        settings["chat_template"] = template
    write_json(folder / "tokenizer_config.json", settings | named)


def _byte_level(gguf: GgufFile, tokens: list[str]) -> Tokenizer:
    name = gguf.metadata.get("tokenizer.ggml.pre", "default")
    if name not in _PRE:
        raise UsageError(
            f"{gguf.path.name} asks for the pre-tokenizer {name!r}, which teal does not know",
            hint=f"known are {', '.join(_PRE)}; the original checkpoint has its own tokenizer.json",
        )
    pre = _PRE[name]
    merges = [tuple(merge.split(" ", 1)) for merge in gguf.metadata.get("tokenizer.ggml.merges", [])]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        model = models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=pre.ignore_merges)
    except Exception as error:  # tokenizers raises a bare Exception for a merge that is not in the vocabulary
        raise damaged(gguf.path, f"its merges do not fit its vocabulary ({error})") from error
    tokenizer = Tokenizer(model)
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(gguf: GgufFile, tokens: list[str], kinds: list[int]) -> Tokenizer:
    """SentencePiece BPE: merges are recovered from the pieces' scores, unknown bytes fall back to <0xNN>."""
    scores = gguf.metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise damaged(gguf.path, "its vocabulary has no scores")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None)
    merges = _merges(vocabulary, scores, kinds)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces: list[Any] = [normalizers.Replace(" ", _SPACE)]
    unspace: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if gguf.metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend(_SPACE))
        unspace.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(unspace)
    if unknown is not None:
        tokenizer.add_special_tokens([AddedToken(unknown, special=True, normalized=False)])
    return tokenizer


def _merges(vocabulary: dict[str, int], scores: list[float], kinds: list[int]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a piece, best score first, as SentencePiece merges them."""
    found: list[tuple[float, int, int, str, str]] = []
    for piece, i in vocabulary.items():
        if kinds[i] in (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[i], vocabulary[left], vocabulary[right], left, right))
    found.sort(key=lambda merge: merge[:3])
    return [(left, right) for _, _, _, left, right in found]


def _named_tokens(gguf: GgufFile, tokens: list[str]) -> dict[str, str]:
    """{"bos_token": "<s>", ...} for the ids that the file names."""
    keys = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    named = {}
    for key, name in keys.items():
        token = gguf.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token is None:
            continue
        if not 0 <= token < len(tokens):
            raise damaged(gguf.path, f"its {name} has id {token}, beyond the vocabulary of {len(tokens)}")
        named[name] = tokens[token]
    return named


def _post_processor(gguf: GgufFile, named: dict[str, str], tokenizer: Tokenizer) -> Any:
    """Adds bos and eos around a text as the file asks; SentencePiece files that say nothing want bos."""
    default_bos = gguf.metadata["tokenizer.ggml.model"] == "llama"
    parts = ["$A"]
    if gguf.metadata.get("tokenizer.ggml.add_bos_token", default_bos) and "bos_token" in named:
        parts.insert(0, named["bos_token"])
    if gguf.metadata.get("tokenizer.ggml.add_eos_token", False) and "eos_token" in named:
        parts.append(named["eos_token"])
    used = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(parts) if token != "$A"]
    byte_level = processors.ByteLevel(trim_offsets=False)
    template = processors.TemplateProcessing(single=parts, pair=[*parts, "$B"], special_tokens=used)
    return processors.Sequence([byte_level, template]) if not default_bos else template
