"""Passages of existing text as chat turns, for a target to read: ``python -m benchmarks.prompts.text``.

Training data at the speed of prefill: the labels are the target's own distributions, so the words may be anybody's.
A turn asks for the continuation of a passage's beginning. General: Debian's handbook and Python's documentation; code:
the files that ``train_extra`` takes functions from. Nothing that mentions law, licences or medicine, and nothing that
shares eight words in a row with an evaluation prompt.
"""

from __future__ import annotations

import html
import io
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import typer

from benchmarks.prompts.build import Prompt, read_eval, shingles, shingles_of, stable_hash, write
from benchmarks.prompts.sources import CACHE, Domain, Package, debian_data, fetch
from benchmarks.prompts.train_extra import PYTHON, python_files

TEXT_PATH = CACHE / "text.jsonl"
PER_DOMAIN = 1600
PASSAGE_CHARACTERS = 1400
HEAD_CHARACTERS = 150
LEFT_OUT = re.compile(r"licen[cs]e|copyright|patent|legal|\blaws?\b|medic|disease|clinic", re.IGNORECASE)
_WORDINGS: dict[Domain, tuple[str, str]] = {
    "general": ("Continue this text.\n\n{head}", "{rest}"),
    "code": ("Continue this code.\n\n```python\n{head}\n```", "```python\n{rest}\n```"),
}
_ELEMENT = re.compile(r"<(p|pre|h[1-6]|li|div(?= class=\"para\"))\b[^>]*>(.*?)</\1>", re.DOTALL)
_MARKS = {"li": "- ", "h1": "# ", "h2": "## ", "h3": "### "}


@dataclass(frozen=True)
class Manual:
    """HTML pages of a Debian package: those whose paths match ``pages``."""

    package: Package
    licence: str
    pages: re.Pattern[str]


MANUALS = (
    Manual(
        Package(
            "debian",
            "debian-handbook",
            "11.20220922",
            "debian-handbook_11.20220922_all.deb",
            "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
        ),
        "CC-BY-SA-3.0",
        re.compile(r"/html/en-US/.*\.html$"),
    ),
    Manual(
        Package(
            "debian",
            "python3.13-doc",
            "3.13.5-2+deb13u5",
            "python3.13-doc_3.13.5-2+deb13u5_all.deb",
            "a8a924637eeb25e666df5bbf7660ae09eb280be9effa39f9f6929e7a452bf65c",
        ),
        "PSF-2.0",
        re.compile(r"/html/(tutorial|howto|faq|library|reference|using|distributing|extending)/.*\.html$"),
    ),
)


def blocks_of_page(page: str) -> list[str]:
    """Paragraphs, headings, items and listings of a page of HTML, marked up as answers of a chat are."""
    blocks = []
    for match in _ELEMENT.finditer(page):
        name, text = match[1], html.unescape(re.sub(r"<[^>]+>", "", match[2]))
        if name == "pre":
            blocks.append(f"```\n{text.strip()}\n```")
        elif text := " ".join(text.replace("¶", "").split()):
            blocks.append(_MARKS.get(name, "") + text)
    return blocks


def passages(blocks: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Beginning and rest of runs of blocks, about ``PASSAGE_CHARACTERS`` long; what is left at the end is dropped."""
    head: list[str] = []
    rest: list[str] = []
    for block in blocks:
        if sum(map(len, head)) < HEAD_CHARACTERS:
            head.append(block)
        else:
            rest.append(block)
        if rest and sum(map(len, [*head, *rest])) >= PASSAGE_CHARACTERS:
            yield "\n\n".join(head), "\n\n".join(rest)
            head, rest = [], []


def manual_prompts(manual: Manual) -> Iterator[Prompt]:
    package = manual.package
    with tarfile.open(fileobj=io.BytesIO(debian_data(fetch(package)))) as archive:
        for member in archive:
            if member.isfile() and manual.pages.search(member.name):
                file = archive.extractfile(member)
                assert file is not None
                blocks = blocks_of_page(file.read().decode())
                source = f"{package.name} {package.version}"
                yield from _prompts("general", member.name, blocks, source, manual.licence)


def code_prompts() -> Iterator[Prompt]:
    """All passages of Python files, cut at empty lines."""
    for path, name in python_files():
        blocks = [block for block in re.split(r"\n\n+", path.read_text(errors="replace")) if block.strip()]
        yield from _prompts("code", name, blocks, *PYTHON)


def _prompts(domain: Domain, name: str, blocks: Sequence[str], source: str, licence: str) -> Iterator[Prompt]:
    question, answer = _WORDINGS[domain]
    for number, (head, rest) in enumerate(passages(blocks)):
        # A table of data in a source file can be one block of megabytes.
        if len(head) + len(rest) < 2 * PASSAGE_CHARACTERS and not LEFT_OUT.search(head + rest):
            yield Prompt(
                id=f"text/{name}/{number}",
                domain=domain,
                split="train",
                messages=[
                    {"role": "user", "content": question.format(head=head)},
                    {"role": "assistant", "content": answer.format(rest=rest)},
                ],
                passage=f"{head}\n\n{rest}",
                source=source,
                licence=licence,
            )


def sample(prompts: Iterable[Prompt], count: int, evaluation: Sequence[Prompt]) -> list[Prompt]:
    """The first ``count`` by their hashes that share no eight words in a row with an evaluation prompt."""
    known = shingles_of(evaluation)
    chosen: list[Prompt] = []
    for prompt in sorted(prompts, key=lambda prompt: stable_hash("text", prompt.id)):
        if len(chosen) < count and known.isdisjoint(shingles(prompt.passage)):
            chosen.append(prompt)
    return chosen


def main() -> None:
    """Fetches the manuals and writes as many passages of code as of general text."""
    evaluation = read_eval()
    general = [sample(manual_prompts(manual), PER_DOMAIN // len(MANUALS), evaluation) for manual in MANUALS]
    chosen = [*(prompt for part in general for prompt in part), *sample(code_prompts(), PER_DOMAIN, evaluation)]
    write(TEXT_PATH, chosen)
    print(f"{len(chosen)} passages in {TEXT_PATH}")


if __name__ == "__main__":
    typer.run(main)
