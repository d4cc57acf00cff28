"""Texts with a gap, as models of code have learned to fill it."""

from __future__ import annotations

from engine.text.tokenizer import Tokenizer

_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
)
"""Before what precedes the gap, before what follows it, and before what is missing."""


def fill_in_prompt(tokenizer: Tokenizer, before: str, after: str) -> str | None:
    """The prompt that asks for what is between two texts; None where the model has no tokens that say so."""
    for first, second, third in _MARKS:
        if all(tokenizer.backend.token_to_id(mark) is not None for mark in (first, second, third)):
            return first + before + second + after + third
    return None
