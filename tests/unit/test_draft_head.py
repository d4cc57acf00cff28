"""Candidates over core and tails: the compiled kernel and the Triton kernel against the reference.

Triton's interpreter takes the place of a GPU where there is none.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evospec.kernels import native
from evospec.kernels.draft_head import draft_head_topk, draft_head_topk_reference
from evospec.kernels.head_rows import EMPTY, Core, TailSlabs
from evospec.kernels.native import MatrixPart, PackedMatrix, Team, linear

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
NEEDS_NATIVE = pytest.mark.skipif(native.unsupported_reason() is not None, reason=str(native.unsupported_reason()))
SUM_TOLERANCE = 1e-4
"""Of logits of size 1 or so, from exact products in another order of summation."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a case; with ``is_whole`` all values are small integers: sums are exact, and many logits equal."""

    rows: int
    columns: int
    slots: int
    hidden: int
    k: int
    has_ids: bool
    is_whole: bool
    seed: int


ROWS = st.integers(1, 20)


def shapes(
    hidden: st.SearchStrategy[int], columns: int = 700, slots: int = 300, rows: st.SearchStrategy[int] = ROWS
) -> st.SearchStrategy[Shape]:
    return st.builds(
        Shape,
        rows=rows,
        columns=st.integers(1, columns),
        slots=st.integers(0, slots),
        hidden=hidden,
        k=st.sampled_from([1, 2, 5, 64, 100, 2000]),
        has_ids=st.booleans(),
        is_whole=st.booleans(),
        seed=st.integers(0, 2**31),
    )


class Case:
    """A head of ``columns + slots`` tokens (at least), cut into a core and three tails, some of whose slots are empty.

    Hidden states and head are exact in bfloat16, whatever ``dtype`` they are given as.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(shape.seed)
        self.shape = shape
        self.vocab = vocab = shape.columns + 3 * shape.slots

        def values(*size: int) -> torch.Tensor:
            if shape.is_whole:
                return torch.randint(-1, 2, size, generator=generator).to(device, dtype)
            noise: torch.Tensor = torch.randn(*size, generator=generator) / shape.hidden**0.25
            return noise.bfloat16().to(device, dtype)

        self.hidden, self.head = values(shape.rows, shape.hidden), values(vocab, shape.hidden)
        self.core_ids = torch.arange(shape.columns, dtype=torch.int32)
        if shape.has_ids:
            self.core_ids = torch.randperm(vocab, generator=generator)[: shape.columns].sort().values.int()
        self.slabs = torch.randint(0, 3, (shape.rows,), generator=generator, dtype=torch.int32).to(device)
        self.tails = TailSlabs(lambda ids: self.head[ids], 3, shape.slots, shape.hidden, dtype, device)
        others = sorted(set(range(vocab)) - set(self.core_ids.tolist()))
        for slab in range(3):
            used = (torch.rand(shape.slots, generator=generator) < 0.6).nonzero().flatten().tolist()
            self.tails.write(slab, used, [others[(3 * slot + slab) % len(others)] for slot in used])
        self.core_rows = self.head[self.core_ids.to(device)]
        self.core = Core(
            lambda hidden: torch.nn.functional.linear(hidden, self.core_rows).float(),
            self.core_ids.to(device) if shape.has_ids else None,
            self.core_rows,
        )

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        return draft_head_topk_reference(self.hidden, self.core, self.shape.k, self.tails, self.slabs)

    def check(self, found: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Compare with the reference in float32; equal in ids too where sums are exact."""
        exact = Core(lambda hidden: hidden.float() @ self.core_rows.float().T, self.core.token_ids, self.core_rows)
        wide = TailSlabs(lambda ids: self.head[ids], 3, self.shape.slots, self.shape.hidden, torch.float32, DEVICE)
        wide.rows, wide.token_ids = self.tails.rows.float(), self.tails.token_ids
        values, ids = draft_head_topk_reference(self.hidden.float(), exact, self.shape.k, wide, self.slabs)
        assert found[0].dtype == torch.float32
        assert found[1].dtype == torch.int32
        torch.testing.assert_close(found[0], values, rtol=0, atol=0 if self.shape.is_whole else SUM_TOLERANCE)
        if self.shape.is_whole:
            assert torch.equal(found[1], ids)
        self._check_ids(*found)

    def _check_ids(self, values: torch.Tensor, ids: torch.Tensor) -> None:
        """Every id is there once, is the token that has the logit, and was allowed."""
        logits = self.hidden.float() @ self.head.float().T
        for row, (row_values, row_ids) in enumerate(zip(values, ids.tolist(), strict=True)):
            kept = [token_id for token_id in row_ids if token_id != EMPTY]
            assert row_ids == kept + [EMPTY] * (len(row_ids) - len(kept))
            assert len(set(kept)) == len(kept)
            allowed = {*self.core_ids.tolist(), *self.tails.token_ids[self.slabs[row]].tolist()} - {EMPTY}
            assert set(kept) <= allowed
            assert len(kept) == min(self.shape.k, len(allowed))
            torch.testing.assert_close(row_values[: len(kept)], logits[row, kept], rtol=0, atol=SUM_TOLERANCE)
            assert row_values[len(kept) :].isneginf().all()


@pytest.fixture(scope="module")
def teams() -> dict[int, Team]:
    return {threads: Team(threads) for threads in (1, 2, 3)}


@settings(max_examples=60)
@given(shapes(st.integers(1, 80)))
def test_reference_is_the_sorted_vocabulary(shape: Shape) -> None:
    """By definition: all logits of the allowed tokens in one list, sorted by logit, then place."""
    case = Case(shape, torch.float32, CPU)
    values, ids = case.expected()
    logits = (case.hidden @ case.head.T).tolist()
    for row in range(shape.rows):
        tail = case.tails.token_ids[case.slabs[row]].tolist()
        order = [(logits[row][t], t) if t != EMPTY else (-np.inf, EMPTY) for t in case.core_ids.tolist() + tail]
        order = sorted(order, key=lambda entry: -entry[0])[: shape.k]  # stable
        torch.testing.assert_close(values[row], torch.tensor([v for v, _ in order]), rtol=0, atol=SUM_TOLERANCE)
        if shape.is_whole:
            assert ids[row].tolist() == [token_id for _, token_id in order]


@NEEDS_NATIVE
@settings(max_examples=100)
@given(shape=shapes(st.sampled_from([32, 64, 160, 576])), threads=st.sampled_from([1, 2, 3]), has_team=st.booleans())
def test_compiled_kernel(teams: dict[int, Team], shape: Shape, threads: int, has_team: bool) -> None:
    case = Case(shape, torch.bfloat16, CPU)
    packed = PackedMatrix(shape.columns, shape.hidden, [MatrixPart(np.arange(shape.columns), values=case.core_rows)])
    core = Core(lambda hidden: linear(teams[threads], packed, hidden), case.core.token_ids)
    team = teams[threads] if has_team else None
    case.check(draft_head_topk(case.hidden, core, shape.k, case.tails, case.slabs, team))


@settings(max_examples=8)
@given(shapes(st.integers(1, 80), columns=70, slots=20, rows=st.sampled_from([1, 2, 3, 17])))
def test_triton_kernel(shape: Shape) -> None:
    """In small blocks: what the interpreter does is proportional to their size, and there are more of them.

    A block has 16 rows, so of 17 there are two.
    """
    from evospec.kernels.triton import draft_head as kernel

    case = Case(shape, torch.float32, DEVICE)
    arguments = (case.hidden, case.core_rows, case.core.token_ids, shape.k, case.tails, case.slabs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_SLOTS", 8)
        patch.setattr(kernel, "_TAIL_WIDTH", 32)
        case.check(kernel.draft_head_topk_triton(*arguments, block=16))
