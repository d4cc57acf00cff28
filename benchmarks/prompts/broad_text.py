"""Broad text to count tokens of: ``python -m benchmarks.prompts.broad_text CHECKOUTS``.

Prose, instructions and answers, documentation, many programming languages and some human ones, from public
repositories at fixed commits. ``evospec vocab add-text`` counts it. A document is a file, or a line of a ``.jsonl``
file; one that shares eight words in a row with an evaluation prompt is left out.
"""

from __future__ import annotations

import html
import json
import re
import subprocess
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.prompts.build import shingles, stable_hash
from benchmarks.prompts.sets import evaluation_shingles
from benchmarks.prompts.sources import CACHE

BROAD_PATH = CACHE / "broad"
MAX_FILE_BYTES = 4 * 2**20
_TAG = re.compile(r"<[^>]+>")


@dataclass(frozen=True)
class Repository:
    """A repository on GitHub at a commit. Documents are the files whose paths end as ``paths`` says."""

    name: str
    commit: str
    licence: str
    paths: str
    max_characters: int = 3_000_000
    """So that no repository outweighs the others."""


_BOOK, _PAGES = r"/text/.*\.xhtml$", r"\.mdx?$"
_CODE = r"\.(py|js|ts|java|kt|c|h|cc|cpp|hpp|cs|go|rs|rb|php|swift|scala|hs|ex|exs|R|sh|zsh|sql|html|css|md|rst)$"
REPOSITORIES = (
    Repository("chinapedia/wikipedia.abstract.en", "4f3e897da088", "CC-BY-SA-3.0", r"^Page/.*\.md$", 160_000_000),
    Repository("yizhongw/self-instruct", "0b26ccaa4159", "Apache-2.0", r"data_per_template/.*\.jsonl$", 60_000_000),
    Repository("openai/grade-school-math", "3101c7d50724", "MIT", r"data/train\.jsonl$"),
    Repository("standardebooks/samuel-pepys_the-diary", "a3031890b10b", "CC0-1.0", _BOOK),
    Repository("standardebooks/arthur-conan-doyle_the-adventures-of-sherlock-holmes", "23b2b6e0aa13", "CC0-1.0", _BOOK),
    Repository("standardebooks/jane-austen_pride-and-prejudice", "8ec1ca806088", "CC0-1.0", _BOOK),
    Repository("standardebooks/p-g-wodehouse_love-among-the-chickens", "225f938a7eea", "CC0-1.0", _BOOK),
    Repository("standardebooks/walt-whitman_leaves-of-grass", "90dcc864bfee", "CC0-1.0", _BOOK),
    Repository("openstax/osbooks-principles-economics-bundle", "cd31beb103ff", "CC-BY-4.0", r"\.cnxml$"),
    Repository("d2l-ai/d2l-en", "23d7a5aeccee", "CC-BY-SA-4.0", _PAGES),
    Repository("stacks/stacks-project", "4ac4815d5a00", "GFDL-1.2", r"\.tex$"),
    Repository("adambard/learnxinyminutes-docs", "38f6ecf8b9b9", "CC-BY-SA-3.0", _PAGES, 6_000_000),
    Repository("tldr-pages/tldr", "08e345f42639", "CC-BY-4.0", _PAGES, 1_200_000),
    Repository("EbookFoundation/free-programming-books", "5b277d20f623", "CC-BY-4.0", _PAGES, 600_000),
    Repository("donnemartin/system-design-primer", "ae9bbd7b02d9", "CC-BY-4.0", _PAGES),
    Repository("exercism/problem-specifications", "03f83310ed05", "MIT", _PAGES),
    Repository("rust-lang/book", "917544888a55", "MIT", _PAGES),
    Repository("vuejs/docs", "01e098a96795", "CC-BY-4.0", _PAGES),
    Repository("reactjs/zh-hans.react.dev", "f6cda05526ce", "CC-BY-4.0", _PAGES, 1_200_000),
    Repository("reactjs/ja.react.dev", "7f38231d9d5d", "CC-BY-4.0", _PAGES, 1_200_000),
    Repository("reactjs/ru.react.dev", "2361adda823b", "CC-BY-4.0", _PAGES, 1_200_000),
    Repository("reactjs/es.react.dev", "e91a76a98e02", "CC-BY-4.0", _PAGES, 1_200_000),
    Repository("reactjs/fr.react.dev", "d60169fc8269", "CC-BY-4.0", _PAGES, 1_200_000),
    Repository("reactjs/de.react.dev", "2e664a02b30e", "CC-BY-4.0", _PAGES, 1_200_000),
    Repository("TheRenegadeCoder/sample-programs", "d71144351a72", "MIT", r"^archive/"),
    Repository("TheAlgorithms/Python", "f5988cc09713", "MIT", _CODE),
    Repository("TheAlgorithms/Java", "9d05db2d1470", "MIT", _CODE),
    Repository("TheAlgorithms/C-Plus-Plus", "b9c118fb5dca", "MIT", _CODE),
    Repository("TheAlgorithms/C-Sharp", "5aee9651da06", "GPL-3.0-only", _CODE),
    Repository("TheAlgorithms/JavaScript", "08d8c6b6749c", "GPL-3.0-only", _CODE),
    Repository("pallets/flask", "2ac89889f4cc", "BSD-3-Clause", _CODE),
    Repository("numpy/numpy", "1f90bbb55e65", "BSD-3-Clause", _CODE),
    Repository("sqlalchemy/sqlalchemy", "f35da7e2b934", "MIT", _CODE),
    Repository("pytest-dev/pytest", "df87db7b0462", "MIT", _CODE),
    Repository("vuejs/core", "e2bede96134f", "MIT", _CODE),
    Repository("expressjs/express", "a3714473feb3", "MIT", _CODE),
    Repository("axios/axios", "23a25af0688d", "MIT", _CODE),
    Repository("rails/rails", "2a2db1e8d6d1", "MIT", _CODE),
    Repository("laravel/framework", "bd71b45fbb7e", "MIT", _CODE),
    Repository("spring-projects/spring-boot", "c329ffa25dc1", "Apache-2.0", _CODE),
    Repository("square/okhttp", "1682d9bac8c0", "Apache-2.0", _CODE),
    Repository("Kotlin/kotlinx.coroutines", "792ac67bdcd5", "Apache-2.0", _CODE),
    Repository("curl/curl", "5c61e168698a", "curl", _CODE),
    Repository("tokio-rs/tokio", "ea91b33ca57f", "MIT", _CODE),
    Repository("BurntSushi/ripgrep", "3fce3b5bb023", "MIT", _CODE),
    Repository("gin-gonic/gin", "dcaa4296d111", "MIT", _CODE),
    Repository("prometheus/prometheus", "d15adb9ad7e5", "Apache-2.0", _CODE),
    Repository("apple/swift-nio", "63018571c88a", "Apache-2.0", _CODE),
    Repository("elixir-lang/elixir", "63a7a054ceb2", "Apache-2.0", _CODE),
    Repository("scala/scala", "75a4352f73d5", "Apache-2.0", _CODE),
    Repository("jgm/pandoc", "0a9a2f261510", "GPL-2.0-or-later", _CODE),
    Repository("tidyverse/dplyr", "d5e94e7fa8fd", "MIT", _CODE),
    Repository("ohmyzsh/ohmyzsh", "830a5bcfd29f", "MIT", _CODE),
)


def files_of(checkouts: Path, repository: Repository) -> Iterator[tuple[str, str]]:
    """Paths and texts of a repository's files in the order of their hashes; those that are no UTF-8 are left out.

    ``checkouts`` has clones at ``OWNER/NAME``, with or without a work tree. Raises CalledProcessError where one is
    missing, or has no such commit.
    """
    git = ["git", "-C", str(checkouts / repository.name)]
    listed = subprocess.run([*git, "ls-tree", "-rlz", repository.commit], check=True, capture_output=True).stdout
    entries = [entry.split("\t", 1) for entry in listed.decode().split("\0") if entry]
    wanted = [
        (path, fields[2])
        for path, fields in ((path, about.split()) for about, path in entries)
        if fields[3].isdecimal() and int(fields[3]) < MAX_FILE_BYTES and re.search(repository.paths, path)
    ]
    for path, blob in sorted(wanted, key=lambda one: stable_hash("broad", one[0])):
        content = subprocess.run([*git, "cat-file", "blob", blob], check=True, capture_output=True).stdout
        try:
            yield path, content.decode()
        except UnicodeDecodeError:
            continue


def documents_of(path: str, text: str) -> Iterator[str]:
    """The documents of one file: all strings of each line of JSON, a book's text without its tags, or the file."""
    if path.endswith(".jsonl"):
        for line in text.splitlines():
            yield "\n".join(value for value in json.loads(line).values() if isinstance(value, str))
    elif path.endswith((".xhtml", ".cnxml")):
        lines = html.unescape(_TAG.sub("", text)).splitlines()
        yield "\n".join(line.strip() for line in lines if line.strip())
    else:
        yield text


def write(checkouts: Path, repository: Repository, known: Set[tuple[str, ...]], path: Path) -> None:
    """Write what may be counted of a repository to ``path``, up to ``max_characters``, and say how much that was."""
    kept = left_out = characters = 0
    with path.open("w") as file:
        for name, text in files_of(checkouts, repository):
            for document in documents_of(name, text):
                if not known.isdisjoint(shingles(document)):
                    left_out += 1
                    continue
                file.write(f"{document}\n\n")
                kept, characters = kept + 1, characters + len(document)
            if characters >= repository.max_characters:
                break
    kept_text = f"{kept:,} documents, {characters:,} characters"
    print(f"{repository.name} ({repository.licence}): {kept_text}; {left_out:,} documents left out")


def main(
    checkouts: Annotated[Path, typer.Argument(help="Directory with a clone of each repository at OWNER/NAME.")],
) -> None:
    """Write one text file a repository into the cache."""
    known = evaluation_shingles()
    print(f"kept away from {len(known):,} runs of words in evaluation prompts")
    BROAD_PATH.mkdir(parents=True, exist_ok=True)
    for repository in REPOSITORIES:
        write(checkouts, repository, known, BROAD_PATH / f"{repository.name.replace('/', '+')}.txt")


if __name__ == "__main__":
    typer.run(main)
