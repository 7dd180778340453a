"""One GGUF file to one checkpoint folder: config.json, generation_config.json, tokenizer, model.safetensors.

The order is cheap to dear: everything that can be refused is refused before the first weight is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from teal_cli.files import write_json
from teal_cli.registry.convert.config import generation_config, model_config
from teal_cli.registry.convert.reader import GgufFile
from teal_cli.registry.convert.tokenizer import write_tokenizer
from teal_cli.registry.convert.weights import convert_weights
from teal_cli.registry.events import Progress


def convert(gguf: GgufFile, folder: Path) -> Iterator[Progress]:
    """Write the checkpoint of `gguf` into `folder`, which exists; weights are dequantised to bfloat16.

    Yields:
        Progress of stage "convert", in bytes written.

    Raises:
        UsageError: the file holds something that teal does not decode.
        TealError: the file is damaged.
    """
    config = model_config(gguf)
    write_tokenizer(gguf, folder)
    write_json(folder / "generation_config.json", generation_config(gguf))
    yield from convert_weights(gguf, config, folder / "model.safetensors")
    write_json(folder / "config.json", config)  # last: a folder without it is no checkpoint
