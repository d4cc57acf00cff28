"""Where the tokens of an echoed prompt start."""

from __future__ import annotations

import msgspec
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers
from tokenizers.processors import TemplateProcessing

from evospec.engine.messages import TokenLogprob
from evospec.engine.text.tokenizer import Tokenizer
from evospec.server.logprobs import CompletionLogprobsFormatter
from tests.tiny_models import SPECIAL_TOKENS, VOCAB_SIZE, tiny_tokenizer

BOS = SPECIAL_TOKENS[0]


def offsets(token_ids: list[int], tokenizer: Tokenizer, text: str | None) -> list[int]:
    entries = [TokenLogprob(token_id, -1.0, []) for token_id in token_ids[1:]]
    pieces = [msgspec.msgpack.encode(piece) for piece in (entries[:2], entries[2:])]
    prompt = CompletionLogprobsFormatter(tokenizer).push_prompt(token_ids, pieces, text)
    assert len(prompt.tokens) == len(prompt.top_logprobs) == len(prompt.text_offset) == len(token_ids)
    return prompt.text_offset


def test_a_bos_that_the_tokenizer_adds_is_no_part_of_the_text() -> None:
    backend = tiny_tokenizer()
    backend.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer = Tokenizer(backend, VOCAB_SIZE, 0, (), None)
    text = "<|im_start|>a<|im_end|>"
    assert offsets(tokenizer.encode(text), tokenizer, text) == [0, 0, 12, 13]


def test_special_tokens_of_a_prompt_of_ids_have_no_text() -> None:
    tokenizer = Tokenizer(tiny_tokenizer(), VOCAB_SIZE, 0, (), None)
    assert offsets(tokenizer.encode("<|im_start|>a<|im_end|>b"), tokenizer, None) == [0, 0, 1, 1]


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """One that puts a space in front of texts, as those of Llama 2 and Mistral do."""
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁Tehdog", "▁T", "he", "▁d"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [("▁", "T"), ("h", "e"), ("▁", "d")]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens(special)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(backend, len(tokens), 1, (2,), None)


@pytest.mark.parametrize(
    ("text", "of_text", "of_ids"),
    [
        ("The dog", [0, 0, 1, 3, 5, 6], [0, 0, 1, 3, 5, 6]),  # <s> ▁T he ▁d o g
        (" The", [0, 0, 1, 2], [0, 0, 1, 2]),  # <s> ▁ ▁T he
        ("\nThe", [0, 0, 0, 1, 2], [0, 0, 0, 1, 2]),  # <s> ▁ <0x0A> T he
        ("édo", [0, 0, 0, 0, 1, 2], [0, 0, 0, 0, 1, 2]),  # <s> ▁ <0xC3> <0xA9> d o
        ("The</s>The do", [0, 0, 1, 3, 7, 8, 10, 12], [0, 0, 1, 3, 3, 5, 7, 9]),  # the ids say "The The do"
    ],
)
def test_a_space_that_the_tokenizer_adds_is_no_part_of_the_text(
    sentencepiece: Tokenizer, text: str, of_text: list[int], of_ids: list[int]
) -> None:
    token_ids = sentencepiece.encode(text)
    assert offsets(token_ids, sentencepiece, text) == of_text
    assert offsets(token_ids, sentencepiece, None) == of_ids


def test_what_follows_an_echoed_prompt_begins_at_its_end(sentencepiece: Tokenizer) -> None:
    token_ids = sentencepiece.encode("The dog")
    for text in ("The dog", None):
        formatter = CompletionLogprobsFormatter(sentencepiece)
        formatter.push_prompt(token_ids, [], text)
        assert formatter.push([TokenLogprob(token_ids[1], -1.0, [])]).text_offset == [len("The dog")]
