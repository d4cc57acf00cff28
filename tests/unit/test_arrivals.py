"""What the requests of a tenant keep together, and what each has for itself."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from evospec.engine.kv_cache_manager import hash_block
from evospec.engine.messages import EngineRequest, Grammar, SamplingParams
from evospec.engine.request import Arrivals, Request
from tests.unit.scheduler_simulation import BLOCK_SIZE, Simulation

PROMPT = list(range(300, 340))


def arrive(
    arrivals: Arrivals, name: str, tenant: str = "red", prompt: list[int] = PROMPT, max_tokens: int = 4
) -> Request:
    """A request that was encoded and decoded, as from a server."""
    sampling = SamplingParams(max_tokens=max_tokens, seed=0, grammar=Grammar("regex", "a" * 100))
    message = EngineRequest(
        request_id=name, prompt_token_ids=prompt, sampling=sampling, tenant=tenant, prediction_token_ids=[7] * 10
    )
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=EngineRequest)
    return arrivals.take(b"client", decoded)


def test_choices_of_one_prompt_keep_it_once() -> None:
    arrivals = Arrivals(1000)
    choices = [arrive(arrivals, str(number)) for number in range(5)]
    for choice in choices:
        assert choice.prompt_token_ids == PROMPT
        assert choice.prompt_token_ids is choice.all_token_ids is choices[0].prompt_token_ids
        assert choice.prediction is choices[0].prediction
        assert choice.sampling.grammar is choices[0].sampling.grammar


def test_choices_of_one_prompt_hash_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of them comes first; each hashes its own output."""
    hashed: list[tuple[int, ...]] = []

    def count(previous: bytes, token_ids: Sequence[int]) -> bytes:
        hashed.append(tuple(token_ids))
        return hash_block(previous, token_ids)

    monkeypatch.setattr("evospec.engine.kv_cache_manager.hash_block", count)
    simulation, arrivals = Simulation(max_num_seqs=4), Arrivals(1000)
    prompt = [number // BLOCK_SIZE for number in range(3 * BLOCK_SIZE + 9)]
    choices = [arrive(arrivals, str(number), prompt=prompt, max_tokens=9) for number in range(20)]
    for choice in choices:
        simulation.scheduler.add(choice)
    simulation.run(max_steps=200)
    assert len(simulation.finished) == len(choices)
    of_prompt, of_output = hashed[:3], hashed[3:]
    assert of_prompt == [(number,) * BLOCK_SIZE for number in range(3)]
    assert of_output == [(*prompt[-9:], *choices[0].output_token_ids[:7])] * len(choices)


def test_nothing_is_kept_for_others() -> None:
    """Of another tenant, or with another prompt; nor after the last one has gone."""
    arrivals = Arrivals(1000)
    first, other = arrive(arrivals, "a"), arrive(arrivals, "b", tenant="blue")
    assert first.prompt_token_ids is not other.prompt_token_ids
    assert first.sampling.grammar is not other.sampling.grammar
    assert first.prediction is not other.prediction
    longer = arrive(arrivals, "c", prompt=[*PROMPT, 1])
    assert (longer.prompt_token_ids, first.prompt_token_ids) == ([*PROMPT, 1], PROMPT)
    del first, other, longer
    assert not arrivals._last


@pytest.mark.parametrize("tokens", [[1000], [-1], [3, 1000], [*PROMPT, -1]])
def test_tokens_are_checked_also_after_others(tokens: list[int]) -> None:
    arrivals = Arrivals(1000)
    arrive(arrivals, "a")
    with pytest.raises(ValueError, match="prompt"):
        arrive(arrivals, "b", prompt=tokens)


def test_an_output_is_put_behind_its_own_prompt_only() -> None:
    """Choices of one prompt that run together, and end one after the other."""
    simulation, arrivals = Simulation(max_num_seqs=2), Arrivals(1000)
    choices = [arrive(arrivals, str(number), prompt=[1] * 20) for number in range(5)]
    for choice in choices:
        simulation.scheduler.add(choice)
    simulation.run(max_steps=100)
    for choice in choices:
        assert choice.prompt_token_ids == [1] * 20
        assert choice.all_token_ids == [1] * 20 + choice.output_token_ids
        assert len(choice.output_token_ids) == 4
