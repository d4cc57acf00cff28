"""Adapters of a draft: what they change, what is published of them, and what their layout is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from evospec.adapters.alignment.chains import ChainDrafter, ChainStep, SegmentBatch, collate
from evospec.adapters.alignment.updates import Lora
from evospec.engine.adapters_config import LoraTarget
from evospec.engine.models.eagle3 import Eagle3
from evospec.engine.models.lora import adapted_rows, draft_fingerprint, lora_layout
from evospec.engine.online.weight_layout import WeightLayout
from tests.drifting_traffic import DriftingTraffic, TinyDraft
from tests.tiny_drafts import WEIGHTS, make_draft_directory, random_draft
from tests.tiny_models import make_directory

ALL: tuple[LoraTarget, ...] = ("q", "k", "v", "o", "down")


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Eagle3:
    return random_draft(make_directory(tmp_path_factory.mktemp("lora") / "model"))


def trained(draft: Eagle3, targets: tuple[LoraTarget, ...], rank: int = 4) -> Lora:
    lora = Lora.fresh(draft.config, targets, rank, "key")
    for tensor in lora.tensors.values():
        tensor.normal_(0, 0.1, generator=torch.Generator().manual_seed(1)).requires_grad_()
    return lora


def added(lora: Lora, draft: Eagle3, target: LoraTarget, x: torch.Tensor) -> torch.Tensor:
    """What the product of a target's matrix gains."""
    matrix = adapted_rows(draft.config, target).matrix
    out = torch.zeros(len(x), len(draft.get_parameter(WEIGHTS[matrix])))
    lora.add_to(out, x, matrix)
    return out


def inputs(draft: Eagle3, target: LoraTarget) -> torch.Tensor:
    return torch.randn(3, adapted_rows(draft.config, target).num_inputs)


def forward(draft: Eagle3, lora: Lora | None) -> torch.Tensor:
    """All of the draft but attention."""
    torch.manual_seed(0)
    g = draft.fuse(torch.randn(5, draft.fc.in_features))
    q, k, v = draft.qkv(torch.randn(5, draft.config.hidden_size), g, lora)
    mixed = q + (k + v).repeat_interleave(draft.config.num_heads // draft.config.num_kv_heads, dim=1)
    return draft.output(g, mixed, lora)


def merged(draft: Eagle3, lora: Lora) -> dict[str, torch.Tensor]:
    """The adapted weights, differentiable in the adapter's tensors."""
    weights = {name: weight.clone() for name, weight in draft.named_parameters()}
    for target in lora.targets:
        rows = adapted_rows(draft.config, target)
        delta = lora.tensors[f"{target}.b"].T @ lora.tensors[f"{target}.a"]
        weights[WEIGHTS[rows.matrix]][rows.start : rows.end] += delta
    return weights


def test_fresh_adapter_changes_nothing_and_is_the_same_for_the_same_key(draft: Eagle3) -> None:
    lora = Lora.fresh(draft.config, ALL, 32, "key")
    assert torch.equal(forward(draft, lora), forward(draft, None))
    again, other = (Lora.fresh(draft.config, ALL, 32, key) for key in ("key", "other"))
    assert all(torch.equal(lora.tensors[name], again.tensors[name]) for name in lora.tensors)
    assert not torch.equal(lora.tensors["q.a"], other.tensors["q.a"])


@pytest.mark.parametrize("target", ALL)
def test_only_the_rows_of_a_target_change_and_by_what_the_adapter_says(draft: Eagle3, target: LoraTarget) -> None:
    lora, rows, x = trained(draft, (target,)), adapted_rows(draft.config, target), inputs(draft, target)
    gain = added(lora, draft, target, x)
    inside = torch.zeros(gain.shape[1], dtype=torch.bool)
    inside[rows.start : rows.end] = True
    assert not gain[:, ~inside].any()
    wanted = (x @ lora.tensors[f"{target}.a"].T) @ lora.tensors[f"{target}.b"]
    torch.testing.assert_close(gain[:, inside], wanted)


class WithWeights(nn.Module):
    """Chains of a draft with other weights, differentiable in these."""

    def __init__(self, drafter: ChainDrafter) -> None:
        super().__init__()
        self.drafter, self.draft = drafter, drafter.draft

    def forward(self, batch: SegmentBatch, token_ids: torch.Tensor) -> list[ChainStep]:
        return self.drafter.steps(batch, token_ids)

    def steps(self, weights: dict[str, torch.Tensor], batch: SegmentBatch, token_ids: torch.Tensor) -> list[ChainStep]:
        named = {f"draft.{name}": weight for name, weight in weights.items()}
        steps: list[ChainStep] = torch.func.functional_call(self, named, (batch, token_ids))
        return steps


def test_chains_and_gradients_are_those_of_merged_weights(tmp_path: Path) -> None:
    tiny = TinyDraft.make(tmp_path)
    draft = tiny.drafter.draft
    segments = [answer.segment() for answer in DriftingTraffic(tiny.drafter).answers(2)]
    features = torch.randn(len(segments), len(segments[0].positions), draft.fc.in_features).bfloat16()
    batch = collate([replace(each, inputs=row) for each, row in zip(segments, features, strict=True)], 3)
    tokens = torch.arange(len(tiny.drafter.target.head))
    for targets in (*((target,) for target in ALL), ALL):
        lora = trained(draft, targets)
        all_steps = (
            replace(tiny.drafter, lora=lora).steps(batch, tokens),
            WithWeights(tiny.drafter).steps(merged(draft, lora), batch, tokens),
            tiny.drafter.steps(batch, tokens),
        )
        ours, theirs, base = (torch.cat([step.logits for step in steps]) for steps in all_steps)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        assert (theirs - base).abs().mean() > 10 * (ours - theirs).abs().mean()
        counts, tensors = torch.randn_like(ours), list(lora.tensors.values())
        one, other = (torch.autograd.grad((each * counts).sum(), tensors) for each in (ours, theirs))
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_query_and_value_rows_are_where_the_draft_looks_for_them(draft: Eagle3) -> None:
    embedding, g = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    before, after = draft.qkv(embedding, g), draft.qkv(embedding, g, trained(draft, ("q", "v")))
    assert [torch.equal(old, new) for old, new in zip(before, after, strict=True)] == [False, True, False]


def test_gradients_reach_the_adapter_and_not_the_draft(draft: Eagle3) -> None:
    lora = trained(draft, ALL)
    forward(draft, lora).square().sum().backward()  # type: ignore[no-untyped-call]
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in lora.tensors.values())
    assert all(weight.grad is None for weight in draft.parameters())


def test_what_is_published_is_the_adapter(draft: Eagle3) -> None:
    lora = trained(draft, ALL)
    published = lora.published()
    lora_layout(draft.config, 4, ALL, "base").check(published)
    theirs = Lora.of_published(draft.config, published)
    assert set(theirs.targets) == set(ALL)
    for name, tensor in theirs.tensors.items():
        assert torch.equal(tensor, lora.tensors[name].detach().bfloat16().float())
    torch.testing.assert_close(forward(draft, theirs), forward(draft, lora), rtol=0.05, atol=0.05)


def test_layouts_of_other_drafts_ranks_and_targets_differ(draft: Eagle3, tmp_path: Path) -> None:
    config = draft.config
    layouts = [
        lora_layout(config, 4, ("q", "v"), "a"),
        lora_layout(config, 4, ("q", "v"), "b"),
        lora_layout(config, 8, ("q", "v"), "a"),
        lora_layout(config, 4, ["q"], "a"),
    ]
    as_floats = tuple(replace(spec, dtype=torch.float32) for spec in layouts[0].tensors)
    layouts.append(WeightLayout(as_floats, "a"))
    assert len({layout.fingerprint for layout in layouts}) == len(layouts)
    assert lora_layout(config, 4, ("v", "q"), "a") == layouts[0]
    files = make_directory(tmp_path / "model")
    directory = make_draft_directory(tmp_path / "draft", files)
    before = draft_fingerprint(directory)
    assert draft_fingerprint(directory) == before
    config_file = directory / "config.json"
    config_file.write_text(config_file.read_text() + " ")
    assert draft_fingerprint(directory) != before
