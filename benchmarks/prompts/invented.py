"""Training prompts that a model makes up itself: ``python -m benchmarks.prompts.invented MODEL``.

An instruction-tuned model that is given its chat template up to where the user speaks goes on as a user would (Magpie,
arXiv 2406.08464). Such prompts vary more than the wordings of ``train_extra`` do, and any model's draft can be trained
on them. Nothing that mentions law, licences or medicine stays, and nothing that shares eight words in a row with an
evaluation prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import typer
from rich.progress import track

from benchmarks.common.in_process import Engine, Turn, engine_config
from benchmarks.prompts.build import Prompt, read_eval, shingles, shingles_of, training_prompt, write
from benchmarks.prompts.sources import CACHE
from benchmarks.prompts.text import LEFT_OUT
from evospec.engine.config import SchedulerConfig, SpeculationConfig
from evospec.engine.messages import SamplingParams
from evospec.engine.models.registry import resolve_model
from evospec.engine.text.tokenizer import Tokenizer

LICENCE = "Apache-2.0"
TEMPERATURE, TOP_P = 1.0, 0.9
MAX_TOKENS = 160
"""Longer ones are left out: most of them never come to an end."""
MIN_WORDS = 4
_MARK = "|user|"


def user_turn(tokenizer: Tokenizer) -> list[int]:
    """The chat template's tokens up to where the user's words begin."""
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}])
    return tokenizer.encode(rendered[: rendered.index(_MARK)], add_special_tokens=False)


def is_usable(text: str, known: set[tuple[str, ...]]) -> bool:
    """Whether a made-up prompt may be trained on: of some length, in no domain left out, near nothing ``known``."""
    return len(text.split()) >= MIN_WORDS and LEFT_OUT.search(text) is None and known.isdisjoint(shingles(text))


def invent(engine: Engine, seeds: Sequence[int]) -> Iterator[tuple[int, str]]:
    """One text for each seed, with it, as they end; "" where it did not come to an end."""
    turn = Turn(user_turn(engine.tokenizer), tenant="train")
    running: dict[str, tuple[int, list[int]]] = {}
    for seed in seeds:
        sampling = SamplingParams(max_tokens=MAX_TOKENS, seed=seed, temperature=TEMPERATURE, top_p=TOP_P)
        running[engine.start(turn, sampling)] = seed, []
    while running:
        outputs, _ = engine.step()
        for output in outputs:
            seed, tokens = running[output.request_id]
            tokens += output.token_ids
            if output.finish_reason is not None:
                del running[output.request_id]
                yield seed, engine.tokenizer.decode(tokens).strip() if output.finish_reason == "stop" else ""


def main(
    model: Annotated[str, typer.Argument(help="Registry name, path or hub id of an instruction-tuned model.")],
    domain: Annotated[Literal["general", "code"], typer.Option(help="What its prompts count as.")] = "general",
    seeds: Annotated[
        int, typer.Option(help="How many to make: of SmolLM2's nine in ten are usable, of Qwen2.5-Coder's one in four.")
    ] = 4000,
    batch: Annotated[int, typer.Option(help="At a time.")] = 64,
) -> None:
    """Writes ``invented-MODEL.jsonl`` into the cache."""
    config = engine_config(model, SpeculationConfig(method="none"))
    config.scheduler = SchedulerConfig(max_num_seqs=batch, max_waiting=seeds)
    files, known = resolve_model(config.model), shingles_of(read_eval())
    prompts: list[Prompt] = []
    for seed, text in track(invent(Engine(config), range(seeds)), total=seeds):
        if is_usable(text, known):
            name = f"invented-{files.name}/{seed}"
            prompts.append(training_prompt(name, domain, text, text, files.name, LICENCE))
    path = CACHE / f"invented-{files.name}.jsonl"
    write(path, sorted(prompts, key=lambda prompt: prompt.id))
    print(f"{len(prompts)} prompts in {path}")


if __name__ == "__main__":
    typer.run(main)
