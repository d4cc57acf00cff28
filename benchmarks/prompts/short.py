"""Prompts short enough that decoding is what an answer's time is spent on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from benchmarks.common.in_process import encode_chat
from benchmarks.prompts.build import Prompt, read_eval
from engine.config import ModelConfig
from engine.models.registry import resolve_model
from engine.text.tokenizer import Tokenizer

DOMAINS = ["code", "law", "medicine", "general"]
MAX_PROMPT_TOKENS = 400
"""Longer ones are left out: decoding is what is compared."""


def short_prompts(
    model: str, domains: Sequence[str], prompts: Sequence[Prompt] | None = None, limit: int | None = None
) -> dict[str, list[Prompt]]:
    """The prompts of at most ``MAX_PROMPT_TOKENS`` by domain.

    Args:
        model: whose tokens count.
        domains: wanted.
        prompts: to choose from; None: the eval prompts.
        limit: most of a domain, the first ones.
    """
    tokenizer = Tokenizer.from_files(resolve_model(ModelConfig(name=model)))
    known = [p for domain in domains for p in read_eval([domain])] if prompts is None else prompts

    def short(domain: str) -> Iterator[Prompt]:
        of_domain = (prompt for prompt in known if prompt.domain == domain)
        return (prompt for prompt in of_domain if len(encode_chat(tokenizer, prompt)) <= MAX_PROMPT_TOKENS)

    return {domain: list(islice(short(domain), limit)) for domain in domains}


def mixed_prompts(model: str, count: int) -> list[Prompt]:
    """As many of each domain."""
    by_domain = short_prompts(model, DOMAINS)
    return [prompt for group in zip(*by_domain.values(), strict=False) for prompt in group][:count]
