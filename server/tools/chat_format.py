"""What a model's chat template says about its answers: how it writes calls of tools, and whether it thinks first."""

from __future__ import annotations

from dataclasses import dataclass

from evospec.engine.text.tokenizer import Tokenizer

THINK_BEGIN, THINK_END = "<think>", "</think>"


@dataclass(frozen=True)
class CallFormat:
    """A call in a model's own words: ``begin``, the tool's name, ``middle``, the arguments as JSON, ``end``.

    Attributes:
        trigger: what a call in free text begins with, so that nothing but a call may follow; a part of ``begin``.
        separator: between calls; None where a call ends the answer, since ``end`` may be a part of its arguments.
    """

    trigger: str
    begin: str
    middle: str
    end: str
    separator: str | None


HERMES = CallFormat(
    trigger="<tool_call>",
    begin='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    end="}\n</tool_call>",
    separator="\n",
)
"""That of Qwen 2.5 and 3, Hermes, and many more."""
LLAMA = CallFormat(
    trigger='{"name": "',
    begin='{"name": "',
    middle='", "parameters": ',
    end="}",
    separator=None,
)
"""That of Llama 3.1 to 3.3."""


@dataclass(frozen=True)
class ChatFormat:
    """How answers are written. ``calls``: None where the template has no tools, or writes calls in another way."""

    calls: CallFormat | None
    thinks: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatFormat:
        """That of a model, by its chat template."""
        template = tokenizer.chat_template
        if template is None:
            return cls(calls=None, thinks=False)
        thinks = THINK_BEGIN in template.source and THINK_END in template.source
        return cls(_call_format(template.source) if "tools" in template.takes else None, thinks)

    def is_thinking(self, prompt: str) -> bool:
        """Whether a prompt ends where the model's thoughts have begun."""
        return self.thinks and prompt.rstrip().endswith(THINK_BEGIN)


def _call_format(template: str) -> CallFormat | None:
    if HERMES.trigger in template and "arguments" in template and "<function=" not in template:
        return HERMES
    return LLAMA if '"parameters": dictionary' in template else None
