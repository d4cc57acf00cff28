"""The noise hash: its definition, its quality, and the argmax over it.

Statistical tests use fixed seeds, so they never flicker. The rate stated with each is the chance that a
perfect hash would fail it.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evospec.kernels.gumbel_argmax import gumbel_argmax, gumbel_noise, hash_tokens, seeds_tensor
from tests.native_calls import gumbel_argmax as compiled_gumbel_argmax
from tests.unit.chi_square import chi_square_p

FALSE_ALARM = 1e-4
M32, M64 = 2**32 - 1, 2**64 - 1


def mix64(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def mix32(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & M32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & M32
    return x ^ (x >> 16)


def unmix32(x: int) -> int:
    x ^= x >> 16
    x = x * pow(0x846CA68B, -1, 2**32) & M32
    x ^= (x >> 15) ^ (x >> 30)
    x = x * pow(0x7FEB352D, -1, 2**32) & M32
    return x ^ (x >> 16)


def hash_by_definition(seed: int, position: int, token_id: int) -> int:
    """The module's docstring in unsigned Python integers; returns int32(x)."""
    key = mix64((mix64(seed & M64) + position * 0x9E3779B97F4A7C15) & M64)
    x = mix32(mix32((token_id * 0x9E3779B1 + key) & M32) ^ (key >> 32))
    return x - 2**32 if x >= 2**31 else x


def hashes(seeds: list[int], positions: list[int], token_ids: list[int]) -> torch.Tensor:
    return hash_tokens(seeds_tensor(seeds), torch.tensor(positions), torch.tensor([token_ids]))


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**31), st.integers(0, 2**31 - 1))
def test_hash_is_the_documented_one(seed: int, position: int, token_id: int) -> None:
    assert hashes([seed], [position], [token_id]).item() == hash_by_definition(seed, position, token_id)


def test_noise_is_the_documented_function_of_the_hash() -> None:
    seeds, positions, token_ids = [7, 2**64 - 1], [0, 4000], list(range(500))
    noise = gumbel_noise(seeds_tensor(seeds), torch.tensor(positions), torch.tensor([token_ids]))
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        for token_id in token_ids:
            uniform = (hash_by_definition(seed, position, token_id) + 2**31 + 0.5) / 2**32
            assert noise[row, token_id].item() == pytest.approx(-math.log(-math.log(uniform)), rel=1e-6, abs=1e-6)


def sequences() -> dict[str, torch.Tensor]:
    """Hash sequences along each argument, as used: counting up by one."""
    n = 1 << 17
    count = torch.arange(n)
    zeros = torch.zeros(n, dtype=torch.int64)
    return {
        "tokens": hash_tokens(torch.tensor([5]), torch.tensor([9]), count.unsqueeze(0)).flatten(),
        "positions": hash_tokens(zeros + 5, count, torch.tensor([[9]])).flatten(),
        "seeds": hash_tokens(count, zeros + 5, torch.tensor([[9]])).flatten(),
        "high seed bits": hash_tokens(count << 40, zeros, torch.tensor([[0]])).flatten(),
    }


@pytest.mark.parametrize("name", ["tokens", "positions", "seeds", "high seed bits"])
@pytest.mark.parametrize("shift", [24, 16, 8, 0])
def test_every_byte_is_uniform(name: str, shift: int) -> None:
    """Chi-square over 256 values; false alarm 1e-4 for each of 16."""
    counts = torch.bincount((sequences()[name] >> shift).long() & 0xFF, minlength=256)
    assert chi_square_p(counts, torch.full((256,), 1 / 256)) > FALSE_ALARM


@pytest.mark.parametrize("name", ["tokens", "positions", "seeds", "high seed bits"])
@pytest.mark.parametrize("lag", [1, 2, 64])
def test_neighbours_are_independent(name: str, lag: int) -> None:
    """Chi-square over pairs of 32 x 32 values; false alarm 1e-4 for each of 12."""
    top = (sequences()[name] >> 27).long() + 16
    first, second = top.view(-1, 2, lag).unbind(1)
    assert (
        chi_square_p(torch.bincount((first * 32 + second).flatten(), minlength=1024), torch.full((1024,), 1 / 1024))
        > FALSE_ALARM
    )


def test_rows_are_independent_bit_by_bit() -> None:
    """Agreement of all 32 x 32 pairs of bits between rows that differ by one in seed or position.

    3 x 1,024 z-values below 5.5: false alarm 1.2e-4.
    """
    tokens = list(range(20_000))
    bits = [
        (hashes([s], [p], tokens).flatten().unsqueeze(1) >> torch.arange(32)) & 1 for s, p in ((1, 1), (1, 2), (2, 1))
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        agreement = (2.0 * bits[a].double() - 1).T @ (2.0 * bits[b].double() - 1) / math.sqrt(len(tokens))
        assert agreement.abs().max() < 5.5


def test_samples_follow_the_softmax() -> None:
    """40,000 seeds over 24 tokens; false alarm 1e-4."""
    logits = torch.linspace(-3, 2, 24)
    seeds = torch.arange(40_000)
    sampled = compiled_gumbel_argmax(logits.expand(len(seeds), -1), seeds, torch.full_like(seeds, 17))
    assert chi_square_p(torch.bincount(sampled, minlength=24), logits.softmax(0)) > FALSE_ALARM


@pytest.mark.parametrize("vocab_size", [1, 3, 1000, 60_000, 300_000])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 3.0, 40.0, 1e4, 1e8])
def test_whole_vocabulary_equals_reference(vocab_size: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(7, vocab_size, generator=generator) * spread
    logits[3, ::2] = -torch.inf
    if vocab_size > 1:
        logits[4, 1:] = -torch.inf
    seeds, positions = torch.arange(7) - 3, torch.arange(7) * 11
    expected = gumbel_argmax(logits, seeds, positions, torch.arange(vocab_size).unsqueeze(0))
    assert compiled_gumbel_argmax(logits, seeds, positions).tolist() == expected.tolist()


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 1.5])
def test_tokens_that_cannot_win_are_left_out_at_any_temperature(temperature: float) -> None:
    """60 rows of 20,000 tokens: sharp ones, where few may win, and flat ones."""
    logits = torch.randn(60, 20_000, generator=torch.Generator().manual_seed(8)) * torch.linspace(0.1, 9, 60)[:, None]
    seeds, positions = torch.arange(60), torch.arange(60) * 7
    temperatures = torch.full((60,), temperature)
    expected = gumbel_argmax(logits, seeds, positions, temperatures=temperatures)
    output = compiled_gumbel_argmax(logits, seeds, positions, temperatures=temperatures)
    assert output.tolist() == expected.tolist()


def most_noisy_token(seed: int, position: int) -> int:
    """The token with the largest hash: the documented steps backwards."""
    key = mix64((mix64(seed) + position * 0x9E3779B97F4A7C15) & M64)
    return (unmix32(unmix32(M32 >> 1) ^ (key >> 32)) - key) * pow(0x9E3779B1, -1, 2**32) & M32


@pytest.mark.parametrize("score", [22.5, 22.86, 22.9])
def test_the_most_noise_there_is_can_win(score: float) -> None:
    """It is 22.87; another token, looked at long before, has ``score`` more than that one without noise."""
    seed = next(seed for seed in range(100) if most_noisy_token(seed, 9) < 2**31)
    token, at = most_noisy_token(seed, 9), (torch.tensor([seed]), torch.tensor([9]))
    assert hashes([seed], [9], [token]).item() == 2**31 - 1
    logits, ids = torch.full((1, 600), -90.0), torch.arange(600).unsqueeze(0)
    logits[0, 0], logits[0, 599], ids[0, 599] = 0.5 * (score - gumbel_noise(*at, ids)[0, 0]), 0.0, token
    half, expected = torch.tensor([0.5]), [token if score < 22.87 else 0]
    assert gumbel_argmax(logits, *at, ids, temperatures=half).tolist() == expected
    assert compiled_gumbel_argmax(logits, *at, ids, temperatures=half).tolist() == expected


def test_flat_rows_equal_reference_for_many_seeds() -> None:
    """Winners just outside the head of tokens that are always scored must be found too."""
    logits = torch.zeros(300, 5000)
    logits[:, 7] = 8.05
    seeds, positions = torch.arange(300), torch.zeros(300, dtype=torch.int64)
    sampled = compiled_gumbel_argmax(logits, seeds, positions)
    expected = gumbel_argmax(logits, seeds, positions, torch.arange(5000).unsqueeze(0))
    assert sampled.tolist() == expected.tolist()
    assert 50 < (sampled != 7).sum() < 250


@settings(max_examples=50)
@given(st.data())
def test_subset_equals_masked_vocabulary_in_any_order(data: st.DataObject) -> None:
    kept = data.draw(st.lists(st.integers(0, 199), min_size=1, max_size=20, unique=True))
    seed = data.draw(st.integers(0, 2**64 - 1))
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(seed % 2**31))
    masked = torch.full_like(logits, -torch.inf)
    masked[0, kept] = logits[0, kept]
    subset = compiled_gumbel_argmax(logits[:, kept], seeds_tensor([seed]), torch.tensor([3]), torch.tensor([kept]))
    assert subset.tolist() == compiled_gumbel_argmax(masked, seeds_tensor([seed]), torch.tensor([3])).tolist()


def test_ties_go_to_the_lowest_token_id() -> None:
    """At 1e9 float32 cannot see the noise, so all scores are equal."""
    logits, one = torch.full((1, 4), 1e9), torch.tensor([1])
    assert compiled_gumbel_argmax(logits, one, one, torch.tensor([[30, 12, 99, 40]])).tolist() == [12]
    assert compiled_gumbel_argmax(logits, one, one).tolist() == [0]


def test_the_reference_takes_token_ids_of_any_integer_type() -> None:
    """As slabs have them: int32."""
    logits, seeds, positions = torch.randn(2, 4), torch.tensor([1, 2]), torch.tensor([3, 4])
    ids = torch.tensor([[30, 12, 99, 40]])
    wide = gumbel_argmax(logits, seeds, positions, ids)
    narrow = gumbel_argmax(logits, seeds, positions, ids.int())
    assert narrow.dtype == torch.int64
    assert narrow.tolist() == wide.tolist()
