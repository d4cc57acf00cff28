"""Passages of existing text as training data: how they are cut, and which are left out."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.prompts.build import Prompt
from benchmarks.prompts.text import HEAD_CHARACTERS, LEFT_OUT, PASSAGE_CHARACTERS, blocks_of_page, passages, sample

EMPTY = Prompt("", "general", "train", [], "", "", "")


def prompt_of(passage: str) -> Prompt:
    return replace(EMPTY, id=passage[:20], passage=passage)


@given(st.lists(st.text("ab c", min_size=1, max_size=700)))
def test_passages_are_the_blocks_in_order(blocks: list[str]) -> None:
    pairs = list(passages(blocks))
    joined = "\n\n".join(part for pair in pairs for part in pair)
    assert "\n\n".join(blocks).startswith(joined)
    for head, rest in pairs:
        assert len(head) >= HEAD_CHARACTERS
        assert rest
        assert len(head) + len(rest) >= PASSAGE_CHARACTERS


def test_a_page_becomes_markdown() -> None:
    page = """<html><head><title>No</title></head><body><div><h2 id="x">A &amp; B<a href="#x">¶</a></h2>
      <p class="c">Some <em>bold</em>
      words.</p><ul><li><p>one</p></li><li>two</li></ul><pre>if a &lt; b:
    c()
</pre></div></body></html>"""
    assert blocks_of_page(page) == ["## A & B", "Some bold words.", "- one", "- two", "```\nif a < b:\n    c()\n```"]


def test_eight_words_of_an_evaluation_prompt_are_too_many() -> None:
    words = [f"w{number}" for number in range(60)]
    evaluation = [prompt_of(" ".join(words))]
    seven = prompt_of("x y " + ", ".join(words[20:27]) + " and so on and on and on")
    eight = prompt_of("x y " + ", ".join(words[20:28]).upper() + " and so on and on and on")
    assert sample([seven, eight], 5, evaluation) == [seven]


def test_a_sample_does_not_depend_on_the_order() -> None:
    prompts = [prompt_of(f"{number} of these are many more than eight words long") for number in range(50)]
    assert len(sample(prompts, 10, [])) == 10
    assert sample(prompts, 10, []) == sample(prompts[::-1], 10, [])


def test_law_and_medicine_are_left_out() -> None:
    left_out = ("MIT License", "licence", "All copyrights", "by law", "legally", "medicine", "Diseases", "clinical")
    assert all(LEFT_OUT.search(text) for text in left_out)
    assert not any(LEFT_OUT.search(text) for text in ("claw", "flaws", "a lawn", "sort a list"))
