"""The draft vocabularies that benchmarks compare, each named by one string.

``none``, ``full``, ``static:K``, ``dynamic:K+S`` as in ``SpeculationConfig.vocabulary``; after a slash, switches of
``DynamicConfig``, ``copies`` and ``cold``: ``dynamic:2048+1024/prior=off,cold``. Four names stand for others' methods:
``fr-spec:K``, ``paper:K``, ``nanospec`` and ``hard-switch``.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.common.drafting import Drafting
from benchmarks.common.in_process import engine_config
from evospec.engine.config import MAX_TAIL_TOKENS, CacheConfig, EngineConfig, ModelConfig, SpeculationConfig
from evospec.engine.models.registry import resolve_model
from evospec.engine.speculation.build import default_vocabulary
from evospec.engine.text.tokenizer import Tokenizer

FULL = "full"
FR_SPEC = "fr-spec:"
"""Before the number of most frequent tokens (arXiv 2502.14856)."""
NANOSPEC = "nanospec"
PAPER = "paper:"
"""Before the number of frequent tokens beside the session's."""
HARD_SWITCH = "hard-switch"
"""N-grams of the context where they match, else EAGLE-3 over the full head (vLLM's pull request 24344)."""
_NANOSPEC = (
    "target_signal=every,graph=false,semantic=false,tenant_memory=false,prior=off,copies=false,replacement=lru,cold"
)
_PAPER, _PAPER_TAIL = "semantic=true,target_signal=events,tenant_memory=false,prior=off,copies=false", 256
_LARGE = 100_000
_MAX_SESSIONS = 16
_KV_BYTES = 256 * 2**20
"""Of each engine: a dozen are in memory at once."""


@dataclass(frozen=True)
class Mode:
    """One side of the comparison.

    ``cold``: every request comes from a tenant never seen before and has no session. ``switches``: by
    ``hard_switch.switch_hard``.
    """

    name: str
    config: EngineConfig
    cold: bool
    switches: bool = False


def make_mode(name: str, model: str, drafting: Drafting, num_special: int) -> Mode:
    """What a name means.

    ``num_special``: tokens that end or structure a text, the core of ``nanospec``. Raises ``ValueError`` if it means
    nothing.
    """
    vocabulary, _, switches = _written_out(name, num_special).partition("/")
    words = [word for word in switches.split(",") if word]
    dynamic = {key: _value(value) for key, _, value in (word.partition("=") for word in words if word != "cold")}
    speculation = drafting.config(model, vocabulary).speculation.model_dump()
    speculation["copies"] = dynamic.pop("copies", name != HARD_SWITCH)
    speculation["dynamic"] |= {"max_sessions": _MAX_SESSIONS} | dynamic
    config = engine_config(model, SpeculationConfig.model_validate(speculation))
    cache = CacheConfig(prefix_caching=False, max_bytes=_KV_BYTES)
    return Mode(name, config.model_copy(update={"cache": cache}), "cold" in words, name == HARD_SWITCH)


def _written_out(name: str, num_special: int) -> str:
    if name == NANOSPEC:
        return f"dynamic:{num_special}+{MAX_TAIL_TOKENS}/{_NANOSPEC}"
    if name == HARD_SWITCH:
        return FULL
    if name.startswith(FR_SPEC):
        return f"static:{name.removeprefix(FR_SPEC)}/copies=false"
    if name.startswith(PAPER):
        return f"dynamic:{name.removeprefix(PAPER)}+{_PAPER_TAIL}/{_PAPER}"
    return name


def _value(text: str) -> bool | int | str:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.isdigit() else text


@dataclass(frozen=True)
class Sizes:
    """Vocabulary sizes that suit a model.

    ``fr_spec``: FR-Spec's setting, 32,768 rows or a quarter of the vocabulary; ``ours``: what is served by default.
    """

    num_special: int
    fr_spec: int
    statics: tuple[int, int]
    ours: str


def sizes_of(model: str, method: str = "eagle3") -> Sizes:
    """By the size of the vocabulary of a model whose tokens are counted; ``method`` of the draft."""
    tokenizer = Tokenizer.from_files(resolve_model(ModelConfig(name=model)))
    num_special, vocab_size = len(tokenizer.special_token_ids), tokenizer.vocab_size
    ours = default_vocabulary(method, has_counts=True, vocab_size=vocab_size)
    if vocab_size >= _LARGE:
        return Sizes(num_special, 32768, (8192, 4096), ours)
    return Sizes(num_special, vocab_size // 4, (3072, 8192), ours)
