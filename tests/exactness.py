"""The settings and kinds of sampling under which no draft may change an output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from evospec.engine.messages import Grammar, SamplingParams
from tests.tiny_drafts import Setting

NUM_TOKENS = 40
SETTINGS = {
    "alone": Setting(max_num_seqs=1),
    "batch": Setting(),
    "chunks": Setting(max_batched_tokens=20),
    "preemption": Setting(num_blocks=16),
    "cached": Setting(prefix_caching=True),
}
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a", "b"]}
_TAG = {"type": "tag", "begin": "e{", "content": {"type": "json_schema", "json_schema": _SCHEMA}, "end": "}"}
_CALLS = {"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": ["e"], "tags": [_TAG]}}
"""Where a text has an e, JSON begins: as a call of a tool would, also within a draft."""
SAMPLED: dict[str, dict[str, Any]] = {
    "plain": {},
    "truncated": {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "penalties": {"presence_penalty": 0.8, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    "bias and min_p": {"logit_bias": {5: 4.0, 9: -100.0}, "min_p": 0.05, "temperature": 1.4},
    "grammar": {"grammar": Grammar("json_schema", json.dumps(_SCHEMA)), "frequency_penalty": 0.3},
    "calls": {"grammar": Grammar("structural_tag", json.dumps(_CALLS))},
    "few tokens": {"logit_bias": dict.fromkeys((10, 11, 12), 50.0)},  # so that there is something to copy
}


def make_sampling(kind: str, count: int, sampled: Mapping[str, dict[str, Any]] = SAMPLED) -> list[SamplingParams]:
    """Of ``count`` requests, each with a seed of its own: all greedy, or with the sets of ``sampled`` in turn."""
    sets = [{"temperature": 0.0}] if kind == "greedy" else list(sampled.values())
    return [
        SamplingParams(**({"max_tokens": NUM_TOKENS, "ignore_eos": True, "seed": index} | sets[index % len(sets)]))
        for index in range(count)
    ]
