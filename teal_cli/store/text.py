"""The text of a store's tokens, by the tokenizer of the model that the registry has under the store's name.

The only part of reading that needs the model, and of it no more than its tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence

from teal_cli.data.tokenizer import TextStream, load_tokenizer
from teal_cli.errors import UsageError
from teal_cli.registry.registry import Registry
from teal_cli.store.header import StoreHeader


def texts(header: StoreHeader, sequence: int, token_ids: Sequence[int]) -> list[str]:
    """The text that is complete with each token, special tokens as they are written.

    Args:
        header: of the store; it names the model and has the prompts.
        sequence: of the prompt that the tokens follow.

    Raises:
        NotFoundError: the model is not in the registry.
        UsageError: the model of that name is not the one that the store was made with.
        TealError: its tokenizer cannot be read.
    """
    from teal_cli.model.weights import config_sha256

    entry = Registry().get(header.model)
    if config_sha256(entry.path) != header.config_sha256:
        raise UsageError(
            f"{entry.name} is not the model that the store was made with, so that its tokens may mean other text",
            hint="download the model that the store names",
        )
    stream = TextStream(load_tokenizer(entry.path), special=True)
    prompts = header.prompts.get("token_ids") or []
    for token in prompts[sequence] if sequence < len(prompts) else ():
        stream.push(int(token))  # what a token is written as may depend on what comes before it
    return [stream.push(token) for token in token_ids]
