"""The tokenizer of a checkpoint. The only place that asks transformers for one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from teal_cli.errors import TealError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(checkpoint: Path) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer of a checkpoint folder; nothing is fetched and no code of the checkpoint is run.

    Raises:
        TealError: there is none, or its files cannot be read.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    # teal packs texts longer than any context; transformers would warn of each.
    logging.get_logger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    try:
        return AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TealError(
            f"{checkpoint} has no tokenizer that can be read",
            hint="check the model with `teal models verify`",
        ) from error
