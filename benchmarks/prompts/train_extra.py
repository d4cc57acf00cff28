"""More training prompts of code and general text: every wording over every noun and function of the training split.

A draft over-fits below millions of distinct tokens, so it needs tens of thousands of prompts. Sources: WordNet's
nouns, and Python functions of the standard library (PSF-2.0) and of permissively licensed packages of this environment.
"""

from __future__ import annotations

import ast
import itertools
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.prompts.sources import SOURCES, Item

_TEMPLATES = {source.name: source.templates for source in SOURCES}
NOUN_WORDINGS = (
    *_TEMPLATES["wordnet-base"],
    "Explain {title} in three paragraphs.",
    "Write a poem about {title}.",
    "Give me ten ideas for a blog post about {title}.",
    "Compare {title} with {other}: what do they have in common, and how do they differ?",
    "Write a dialogue between two friends who disagree about {title}.",
    "List the advantages and disadvantages of {title}.",
    "How has {title} changed over the last hundred years?",
    "Write an email to a colleague that proposes a project about {title}.",
    "Rewrite this in simpler words, then give two examples. {text}",
    "Plan a lesson about {title} for a class of twelve-year-olds.",
    "Pretend that you are an expert on {title}. What are the most common mistakes of beginners?",
    "Write a product description for a new kind of {title}.",
    "What is the relation between {title} and {other}? Answer step by step.",
    "A shop sells {title} and {other}. Make up a word problem in arithmetic about them and solve it step by step.",
    "Write a news article with the headline: {title} and {other}.",
    "Solve step by step: a box holds 24 items, a third of them {title}, the rest {other}; half of these are sold.",
    "If every {title} costs 3.50 and a {other} twice as much, what do 7 of each cost with 8 % tax? Show your work.",
    "Is this argument valid? Every {title} is a {other}; nothing here is a {other}; so nothing here is a {title}. Why?",
    "Extract the key facts from this text as JSON with the fields name, kind and use.\n\n{title}: {text}",
    "Turn this into a Markdown table of term, meaning and example.\n\n{title}: {text}",
    "Translate this into French and Spanish, then explain the hardest word.\n\n{text}",
    "Correct grammar and style, and list what you changed: she dont never seen no {title} before, isnt it?",
    "You are a detective. Question a witness who saw a {title} beside a {other} last night.",
    "You are a famous chef who is asked about {title}. Stay in character and answer three questions.",
    "Design a database schema in SQL for a shop of {title}, with two queries that a manager would run.",
    "Write a Python program that keeps an inventory of {title} and {other} and prints a report.",
    "Write HTML and CSS for a landing page about {title}.",
    "Write a JavaScript function that sorts a list of {title} objects by name and price, and explain it.",
    "Write a shell script that renames all files with {title} in their name to {other}.",
    "What is the time complexity of finding a {title} in a sorted list, a hash table and a binary tree? Explain.",
    "Explain the science behind {title} to a student of physics, with a formula if there is one.",
    "What did {title} mean for economy, culture and politics in three different countries?",
    'Write a review of a novel called "The {title} and the {other}".',
    "Give the opening paragraph of a speech in which {title} stands for hope.",
    "Classify each as positive, negative or neutral and say why: I adore {title}. The {other} broke. It is there.",
    "Plan a week of travel for somebody who loves {title}: a day-by-day itinerary with costs.",
    "Ask me five questions to find out whether I need {title} or {other}, then say how you would decide.",
    "Summarise in one sentence, then in one paragraph. {title}: {text}",
    "Which of these does not belong: {title}, {other}, seven, blue? Give your reasons step by step.",
    "Write a regular expression that finds {title} or {other} as whole words, with examples that match and do not.",
    "A train leaves with 120 boxes of {title} at 60 km/h, one with {other} at 80 km/h, 300 km off. When do they meet?",
    "Write a haiku, a limerick and a couplet about {title}.",
    "Help me to answer this message politely but firmly: you promised me a {title} and sent a {other}!",
    "What are common misconceptions about {title}? Give the facts with each.",
    "Write the rules of a board game that is played with {title} and {other}.",
)
CODE_WORDINGS = (
    *_TEMPLATES["networkx"],
    "Write the body of this Python function.\n\n```python\n{head}\n```",
    "Add type hints and a docstring to this code.\n\n```python\n{text}\n```",
    "Write a Python function `{title}` and show how to use it.",
    "Write a Python class that uses this function, with an example.\n\n```python\n{text}\n```",
    "Rewrite this in JavaScript, keeping the behaviour.\n\n```python\n{text}\n```",
    "Rewrite this in Rust and in C++.\n\n```python\n{text}\n```",
    "Complete the function. Answer with code only.\n\n```python\n{head}\n```",
    "Make this faster and more readable; show the new version first.\n\n```python\n{text}\n```",
    "What does this print for three inputs of your choice? Go through it line by line.\n\n```python\n{text}\n```",
    "Document this function in Markdown, with parameters, errors and examples.\n\n```python\n{text}\n```",
    "Write a command-line program around this function with argparse.\n\n```python\n{head}\n```",
    "Find the edge cases of this function and handle them.\n\n```python\n{text}\n```",
)
PACKAGES = "sympy click fastapi httpx jinja2 networkx pydantic requests rich starlette structlog typer uvicorn "
PYTHON = f"Python {platform.python_version()} and packages of this environment", "PSF-2.0, BSD-3-Clause, MIT, MPL-2.0"
"""Source and licence of the functions."""
MAX_FUNCTION_WORDS = 160


def noun_prompts(nouns: Sequence[Item]) -> Iterator[tuple[Item, str]]:
    """Every noun in every wording; ``other`` is the next one but six."""
    for (item, other), (number, wording) in itertools.product(
        zip(nouns, [*nouns[7:], *nouns[:7]], strict=True), enumerate(NOUN_WORDINGS)
    ):
        content = wording.format(title=item.title, other=other.title, text=item.text)
        yield Item(f"{item.key}/{number}", item.title, item.text), content


def code_prompts() -> Iterator[tuple[Item, str]]:
    """Every documented function, each in half of the wordings."""
    for number, item in enumerate(_functions()):
        for wording_number, wording in enumerate(CODE_WORDINGS):
            if (number + wording_number) % 2 == 0:
                content = wording.format(title=item.title, text=item.text, head=_head(item.text))
                yield Item(f"{item.key}/{wording_number}", item.title, item.text), content


def _functions() -> Iterator[Item]:
    for path, name in python_files():
        try:
            source = path.read_text()
            nodes = ast.parse(source).body
        except (SyntaxError, UnicodeDecodeError):
            continue  # a test file for the parser itself
        classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
        members = [*nodes, *(member for node in classes for member in node.body)]
        for node in members:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and ast.get_docstring(node):
                text = ast.get_source_segment(source, node) or ""
                if 20 <= len(text.split()) <= MAX_FUNCTION_WORDS:
                    yield Item(f"{name}:{node.name}:{node.lineno}", node.name, text)


def python_files() -> Iterator[tuple[Path, str]]:
    library, site = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    roots = [library, *(site / name for name in PACKAGES.split())]
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root.parent).as_posix()
            if not any(part in name for part in ("/test", "/site-packages/", "/idlelib/", "networkx/algorithms/")):
                yield path, name


def _head(text: str) -> str:
    """Signature and docstring of a function."""
    function = ast.parse(text.strip()).body[0]
    assert isinstance(function, ast.FunctionDef)
    return "\n".join(text.splitlines()[: function.body[0].end_lineno])
