"""Documents hang together: links lead somewhere, documents that the code names are there, and pages are short."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("drafts/**/*.md")])
SOURCES = sorted(
    path
    for folder in ("server", "engine", "adapters", "kernels", "deploy", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".cpp", ".h", ".yaml", ".yml"}
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
IMAGE = re.compile(r"!\[[^\]]+\]\(([^)\s]+)\)")
NAMED = re.compile(r"(?<!/)docs/[\w/-]+\.md")
RECORD = re.compile(r"benchmarks/results/([\w.-]+)")
MOST_LINES = {ROOT / "README.md": 120}
"""All other pages have less than 250."""


def anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = [link for link in LINK.findall(document.read_text()) if "://" not in link]
    for link in links:
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_documents_that_the_code_names_are_there() -> None:
    named = {(path, name) for path in SOURCES for name in NAMED.findall(path.read_text())}
    assert named
    assert [(str(path), name) for path, name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_are_short(document: Path) -> None:
    assert len(document.read_text().splitlines()) < MOST_LINES.get(document, 250)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_every_record_is_cited_and_every_plot_shown() -> None:
    """Files in git only: a benchmark may have been run since."""
    listed = subprocess.run(
        ["git", "ls-files", "benchmarks/results"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    kept = {Path(path).name for path in listed.stdout.split()}
    texts = [document.read_text() for document in DOCUMENTS]
    shown = {Path(link).name for text in texts for link in IMAGE.findall(text)}
    assert kept - {name for text in texts for name in RECORD.findall(text)} == set()
    assert {name for name in kept if name.endswith(".png")} - shown == set()
