"""Adapters of a draft: what they change, what is published of them, and what their layout is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from adapters.lora import Lora, merge_published, merged
from engine.adapters_config import LoraTarget
from engine.models.eagle3 import Eagle3
from engine.models.lora import adapted_rows, draft_fingerprint, lora_layout
from tests.tiny_drafts import make_draft_directory, random_draft
from tests.tiny_models import make_directory

ALL: tuple[LoraTarget, ...] = ("q", "k", "v", "o", "fc", "gate_up", "down")


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Eagle3:
    return random_draft(make_directory(tmp_path_factory.mktemp("lora") / "model"))


def trained(draft: Eagle3, targets: tuple[LoraTarget, ...], rank: int = 4) -> Lora:
    lora = Lora.fresh(draft.config, targets, rank, 8.0, "key")
    for tensor in lora.tensors.values():
        tensor.normal_(0, 0.1, generator=torch.Generator().manual_seed(1)).requires_grad_()
    return lora


def test_fresh_adapter_changes_nothing_and_is_the_same_for_the_same_key(draft: Eagle3) -> None:
    lora = Lora.fresh(draft.config, ALL, 32, 32.0, "key")
    for name, weight in merged(draft, lora).items():
        assert torch.equal(weight, draft.get_parameter(name))
    again, other = (Lora.fresh(draft.config, ALL, 32, 32.0, key) for key in ("key", "other"))
    assert all(torch.equal(lora.tensors[name], again.tensors[name]) for name in lora.tensors)
    assert not torch.equal(lora.tensors["q.a"], other.tensors["q.a"])


@pytest.mark.parametrize("target", ALL)
def test_only_the_rows_of_a_target_change_and_by_what_the_adapter_says(draft: Eagle3, target: LoraTarget) -> None:
    lora = trained(draft, (target,))
    rows = adapted_rows(draft.config, target)
    [(name, weight)] = merged(draft, lora).items()
    base = draft.get_parameter(name)
    inside = torch.zeros(len(base), dtype=torch.bool)
    inside[rows.start : rows.end] = True
    assert torch.equal(weight[~inside], base[~inside])
    x = torch.randn(3, base.shape[1])
    wanted = F.linear(x, base)[:, inside] + 2.0 * (x @ lora.tensors[f"{target}.a"].T) @ lora.tensors[f"{target}.b"].T
    torch.testing.assert_close(F.linear(x, weight)[:, inside], wanted)


def test_query_and_value_rows_are_where_the_draft_looks_for_them(draft: Eagle3) -> None:
    embedding, g = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    before = draft.qkv(embedding, g)
    weights = merged(draft, trained(draft, ("q", "v")))
    after = torch.func.functional_call(_Qkv(draft), {f"draft.{n}": w for n, w in weights.items()}, (embedding, g))
    assert [torch.equal(old, new) for old, new in zip(before, after, strict=True)] == [False, True, False]


class _Qkv(torch.nn.Module):
    def __init__(self, draft: Eagle3) -> None:
        super().__init__()
        self.draft = draft

    def forward(self, embedding: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.draft.qkv(embedding, g)


def test_gradients_reach_the_adapter_and_not_the_draft(draft: Eagle3) -> None:
    lora = trained(draft, ALL)
    sum(weight.square().sum() for weight in merged(draft, lora).values()).backward()  # type: ignore[union-attr]
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in lora.tensors.values())
    assert all(weight.grad is None for weight in draft.parameters())


def test_what_is_published_is_the_adapter_scale_included(draft: Eagle3) -> None:
    lora = trained(draft, ALL)
    published = lora.published(torch.float32)
    lora_layout(draft.config, 4, ALL, "base", torch.float32).check(published)
    assert lora.layout("base", torch.float32) == lora_layout(draft.config, 4, ALL, "base", torch.float32)
    mine, theirs = merged(draft, lora), merge_published(draft, published)
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(weight, mine[name])
    other = Lora.fresh(draft.config, ALL, 4, 8.0)
    other.load(published)
    for name, tensor in other.tensors.items():
        torch.testing.assert_close(tensor, lora.tensors[name].detach())


def test_layouts_of_other_drafts_ranks_and_targets_differ(draft: Eagle3, tmp_path: Path) -> None:
    config = draft.config
    layouts = [
        lora_layout(config, 4, ("q", "v"), "a"),
        lora_layout(config, 4, ("q", "v"), "b"),
        lora_layout(config, 8, ("q", "v"), "a"),
        lora_layout(config, 4, ("q",), "a"),
        lora_layout(config, 4, ("q", "v"), "a", torch.float32),
    ]
    assert len({layout.fingerprint for layout in layouts}) == len(layouts)
    assert lora_layout(config, 4, ("v", "q"), "a") == layouts[0]
    files = make_directory(tmp_path / "model")
    directory = make_draft_directory(tmp_path / "draft", files)
    before = draft_fingerprint(directory)
    assert draft_fingerprint(directory) == before
    config_file = directory / "config.json"
    config_file.write_text(config_file.read_text() + " ")
    assert draft_fingerprint(directory) != before
