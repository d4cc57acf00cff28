"""Where the tokens of an echoed prompt start."""

from __future__ import annotations

from tokenizers.processors import TemplateProcessing

from engine.messages import TokenLogprob
from engine.text.tokenizer import Tokenizer
from server.logprobs import CompletionLogprobsFormatter
from tests.tiny_models import SPECIAL_TOKENS, VOCAB_SIZE, tiny_tokenizer

BOS = SPECIAL_TOKENS[0]


def offsets(token_ids: list[int], tokenizer: Tokenizer, text: str | None) -> list[int]:
    entries = [TokenLogprob(token_id, -1.0, []) for token_id in token_ids[1:]]
    return CompletionLogprobsFormatter(tokenizer).push_prompt(token_ids, entries, text).text_offset


def test_a_bos_that_the_tokenizer_adds_is_no_part_of_the_text() -> None:
    backend = tiny_tokenizer()
    backend.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer = Tokenizer(backend, VOCAB_SIZE, 0, (), None)
    text = "<|im_start|>a<|im_end|>"
    assert offsets(tokenizer.encode(text), tokenizer, text) == [0, 0, 12, 13]


def test_special_tokens_of_a_prompt_of_ids_have_no_text() -> None:
    tokenizer = Tokenizer(tiny_tokenizer(), VOCAB_SIZE, 0, (), None)
    assert offsets(tokenizer.encode("<|im_start|>a<|im_end|>b"), tokenizer, None) == [0, 0, 1, 1]
