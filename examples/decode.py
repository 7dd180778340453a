"""Decode one prompt densely and at 50% sparsity, and say what it cost and gained.

python examples/decode.py [MODEL] [PROMPT]
"""

from __future__ import annotations

import sys

import teal_cli


def main(model: str = "smollm2-135m", prompt: str = "The capital of France is") -> None:
    session = teal_cli.open_session(model)
    dense, sparse = (
        teal_cli.generate(session, prompt, sparsity=target, temperature=0, max_new_tokens=24) for target in (0.0, 0.5)
    )
    same = sum(a == b for a, b in zip(dense.token_ids, sparse.token_ids, strict=False))
    print(f"dense : {dense.tokens_per_s:6.1f} tokens/s  {dense.text!r}")
    print(f"sparse: {sparse.tokens_per_s:6.1f} tokens/s  {sparse.text!r}")
    print(f"{sparse.realised:.1%} of the entries were dropped; {same} of {len(dense.token_ids)} tokens are the same")


if __name__ == "__main__":
    main(*sys.argv[1:])
