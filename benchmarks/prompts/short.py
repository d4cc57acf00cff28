"""Prompts short enough that decoding is what an answer's time is spent on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.prompts.build import Prompt, read_eval
from engine.config import ModelConfig
from engine.models.registry import resolve_model
from engine.text.tokenizer import Tokenizer

DOMAINS = ["code", "law", "medicine", "general"]
MAX_PROMPT_TOKENS = 400
"""Longer ones are left out: decoding is what is compared."""


def short(prompts: Iterable[Prompt], domain: str, tokenizer: Tokenizer) -> list[Prompt]:
    """Those of a domain that have at most ``MAX_PROMPT_TOKENS``."""
    of_domain = (prompt for prompt in prompts if prompt.domain == domain)
    return [prompt for prompt in of_domain if len(tokenizer.encode_messages(prompt.messages)) <= MAX_PROMPT_TOKENS]


def short_prompts(model: str, domains: Sequence[str]) -> dict[str, list[Prompt]]:
    """The short evaluation prompts by domain; ``model``: whose tokens count."""
    tokenizer, prompts = Tokenizer.from_files(resolve_model(ModelConfig(name=model))), read_eval()
    return {domain: short(prompts, domain, tokenizer) for domain in domains}


def mixed_prompts(model: str, count: int) -> list[Prompt]:
    """As many of each domain."""
    by_domain = short_prompts(model, DOMAINS)
    return [prompt for group in zip(*by_domain.values(), strict=False) for prompt in group][:count]
