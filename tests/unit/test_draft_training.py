"""The parts of offline draft training against plain formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from evospec.adapters.chain_walk import ChainBatch, ChainWalk
from evospec.adapters.target_parts import TargetParts, target_parts, with_others
from evospec.adapters.training.checkpoint import TrainingProgress, load_checkpoint, save_checkpoint
from evospec.adapters.training.conversations import Conversation, read_shard, shard_paths, write_shard, written_keys
from evospec.adapters.training.dataset import CONTEXT, MAX_WINDOW, TEMPLATE_TOKENS, Dataset, is_held_out
from evospec.adapters.training.generate import Job, answered_by, jobs_of, left_of, loop_start, read_prompts
from evospec.adapters.training.head_loss import head_loss
from evospec.adapters.training.learner import Learner, Unroller
from evospec.adapters.training.train import VALIDATION_STEPS, Phase, TrainConfig, Trainer
from evospec.engine.config import ModelConfig
from evospec.engine.models.config import ModelError, ModelFiles
from evospec.engine.models.eagle3 import Eagle3, save_draft
from evospec.engine.models.eagle3_config import WEIGHTS_FILE
from evospec.engine.models.registry import resolve_model, validate_model_files
from evospec.engine.models.weights import open_weights
from evospec.engine.text.tokenizer import Tokenizer
from tests.tiny_drafts import make_draft_directory, random_draft
from tests.tiny_models import make_directory

HIDDEN, WIDTH = 4, 16


def dense_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, later: list[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Row t sees the first step's keys up to t, and its own keys of the later steps."""
    length, scale = q.shape[2], q.shape[3] ** -0.5
    scores = (q @ keys.transpose(2, 3) * scale).masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf)
    own = [(q * key).sum(-1, keepdim=True) * scale for key, _ in later]
    weights = torch.cat([scores, *own], dim=-1).softmax(-1)
    result = weights[..., :length] @ values
    for step, (_, value) in enumerate(later):
        result = result + weights[..., length + step, None] * value
    return result


def unrolled_from_all(
    draft: Eagle3, target: TargetParts, g: torch.Tensor, token_ids: torch.Tensor, positions: torch.Tensor, steps: int
) -> list[torch.Tensor]:
    """The head's input [B, T, hidden] at each step of the chains that start at every position."""

    def heads(tensor: torch.Tensor, here: torch.Tensor | None = None) -> torch.Tensor:
        if here is not None:
            tensor = target.rotary(tensor.flatten(0, 1), here.flatten()).view_as(tensor)
        return tensor.repeat_interleave(draft.config.num_heads // tensor.shape[2], dim=2).transpose(1, 2)

    pairs, inputs = list[tuple[torch.Tensor, torch.Tensor]](), []
    for step in range(steps):
        embedding = F.embedding(token_ids[:, step : step + positions.shape[1]], target.embedding)
        q, k, v = draft.qkv(embedding, g)
        pairs.append((heads(k, positions + step), heads(v)))
        attended = dense_attention(heads(q, positions + step), *pairs[0], pairs[1:])
        g = draft.output(g, attended.transpose(1, 2))
        inputs.append(draft.head_input(g))
    return inputs


def lk_loss(hidden: torch.Tensor, target: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """LK-lambda of one piece (arXiv 2602.23881): lambda * CE + (1 - lambda) * TV, lambda = exp(-3 overlap)."""
    wanted, drafted = (target @ rows.T).softmax(-1), (hidden @ rows.T).softmax(-1)
    distance = (wanted - drafted).abs().sum(-1) / 2
    share = torch.exp(-3 * (1 - distance).mean()).detach()
    return (share * -(wanted * drafted.log()).sum(-1) + (1 - share) * distance).sum()


def test_head_loss_is_the_papers_with_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(600, 8, generator=generator, requires_grad=True)  # more than two pieces
    target, rows = torch.randn(600, 8, generator=generator), torch.randn(50, 8, generator=generator)
    loss = head_loss(hidden, target, rows)
    pieces = zip(torch.split(hidden, 256), torch.split(target, 256), strict=True)
    expected = torch.stack([lk_loss(some, wanted, rows) for some, wanted in pieces]).sum()
    torch.testing.assert_close(loss, expected)
    (gradient,), (wanted,) = torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def conversation(key: int, length: int, prompt_length: int) -> Conversation:
    return Conversation(key, prompt_length, np.arange(length, dtype=np.int32) + 1000 * key)


def features_of(conversation: Conversation) -> torch.Tensor:
    """[tokens, WIDTH] bf16: every value of a row is its position."""
    return torch.arange(len(conversation.token_ids)).to(torch.bfloat16)[:, None].expand(-1, WIDTH).contiguous()


def write(directory: Path, conversations: list[Conversation]) -> Path:
    return write_shard(directory, conversations, [features_of(c) for c in conversations])


def test_shards_hold_what_was_written(tmp_path: Path) -> None:
    first, second = conversation(1, 70, 40), conversation(2, 90, 50)
    write(tmp_path, [first, second])
    write(tmp_path, [conversation(3, 60, 30)])
    assert len(shard_paths(tmp_path)) == 2
    assert written_keys(tmp_path) == {1, 2, 3}
    read = list(read_shard(shard_paths(tmp_path)[0]))
    assert [(c.key, c.prompt_length, c.token_ids.tolist()) for c in read] == [
        (c.key, c.prompt_length, c.token_ids.tolist()) for c in (first, second)
    ]


@pytest.mark.parametrize("validation", [False, True])
def test_every_position_is_learned_from_once(tmp_path: Path, validation: bool) -> None:
    conversations = [conversation(key, length, 100) for key, length in ((1, 1200), (2, 300), (50, 1000), (100, 101))]
    write(tmp_path, conversations)
    dataset = Dataset(shard_paths(tmp_path), WIDTH, HIDDEN, validation)
    starts = np.cumsum([0, *(len(c.token_ids) for c in conversations)])
    covered = [w.row + position for w in dataset.windows for position in range(w.begin + w.first_anchor, w.end)]
    assert len(covered) == len(set(covered)) == dataset.num_anchors
    for c, start in zip(conversations, starts[:-1], strict=True):
        if is_held_out(c) == validation and len(c.token_ids) - c.prompt_length >= 4:
            first = start + (c.prompt_length if validation else TEMPLATE_TOKENS)
            end = start + len(c.token_ids)
            assert set(range(first, end - 4)) <= set(covered)
            assert not set(covered) & set(range(start, first))
        else:
            assert not set(covered) & set(range(start, start + len(c.token_ids)))
    assert all(w.end - w.begin <= MAX_WINDOW for w in dataset.windows)
    assert all(w.first_anchor >= CONTEXT for w in dataset.windows if w.begin > 0)


def test_a_batch_lines_features_up_with_tokens_and_labels(tmp_path: Path) -> None:
    write(tmp_path, [conversation(1, 200, 60), conversation(3, 500, 60)])
    dataset = Dataset(shard_paths(tmp_path), WIDTH, HIDDEN)
    (batch,) = dataset.batches(10_000, steps=3, generator=np.random.default_rng(0))
    sizes, firsts = [200, 500 - MAX_WINDOW + CONTEXT, MAX_WINDOW], [TEMPLATE_TOKENS, CONTEXT, TEMPLATE_TOKENS]
    assert len(batch.positions) == 3
    for row in range(3):
        columns = batch.starts[batch.starts // batch.length == row] % batch.length
        size = int(columns[-1]) + 1
        first = sizes.index(size)
        assert columns.tolist() == list(range(firsts[first], size))
        assert batch.lengths[batch.starts // batch.length == row].tolist() == (size - columns).tolist()
        positions = batch.positions[row, :size]
        before = (positions - 1).clamp(min=0).to(torch.bfloat16)  # zero before the first token
        assert torch.equal(batch.features[row, :size, 0], before)
        assert torch.equal(batch.labels[row, :size, 0], positions.to(torch.bfloat16))
        assert torch.equal(batch.token_ids[row, :size] % 1000, positions)


def test_a_checkpoint_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        model(torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = made()
    assert load_checkpoint(tmp_path, model, optimizer) is None
    step(model, optimizer, 1)
    save_checkpoint(tmp_path, model, optimizer, TrainingProgress(step=1, anchors=8, history=[{"loss": [1.5]}]))
    step(model, optimizer, 2)

    resumed, other = made()
    progress = load_checkpoint(tmp_path, resumed, other)
    assert progress == TrainingProgress(step=1, anchors=8, history=[{"loss": [1.5]}])
    step(resumed, other, 2)
    for parameter, wanted in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, wanted)


@pytest.mark.parametrize("period", [1, 3, 17, 64])
def test_loops_are_found(period: int) -> None:
    text = list(range(1000, 1050))
    loop = list(range(period)) * (5 if period > 4 else 20)
    start = loop_start(text + loop)
    assert start is not None
    assert start >= len(text)
    assert loop_start(text + loop[: 2 * period]) is None
    assert loop_start(text) is None


def run_trainer(files: ModelFiles, directory: Path, start_from: Path | None, anchors: int, width: int = 192) -> Trainer:
    """Train on random conversations of a tiny model; the draft goes to ``directory / "draft"``."""
    spec, data = validate_model_files(files), directory / "data"
    if not data.exists():
        torch.manual_seed(0)
        conversations = [
            Conversation(key, 40, np.random.default_rng(key).integers(spec.vocab_size, size=90, dtype=np.int32))
            for key in range(100)  # two of them are held out
        ]
        write_shard(data, conversations, [torch.randn(90, 4 * spec.hidden_size).bfloat16() for _ in conversations])
    config = TrainConfig((0, 1, 2), width, (Phase(anchors, 2, 1e-3, 512),), start_from)
    text, checkpoints, output = directory / "text", directory / f"from-{start_from is not None}", directory / "draft"
    trainer = Trainer(config, spec, files, data, text, checkpoints, output)
    trainer.run()
    return trainer


def test_without_conversations_there_is_nothing_to_train_on(tmp_path: Path) -> None:
    files, start = make_directory(tmp_path / "model"), tmp_path / "start"
    (tmp_path / "data").mkdir()
    save_draft(random_draft(files), start)
    for start_from in (None, start):
        with pytest.raises(ModelError, match=r"adapters\.training\.generate"):
            run_trainer(files, tmp_path, start_from, anchors=10)


@pytest.mark.parametrize("feature_norms", ["none", "each"])
def test_training_goes_on_from_a_draft(tmp_path: Path, feature_norms: Literal["none", "each"]) -> None:
    files, start = make_directory(tmp_path / "model"), tmp_path / "start"
    save_draft(random_draft(files, feature_norms=feature_norms), start)
    run_trainer(files, tmp_path, start, anchors=0)
    begun, written = (load_file(directory / WEIGHTS_FILE) for directory in (start, tmp_path / "draft"))
    assert begun.keys() == written.keys()
    for name, weight in begun.items():
        torch.testing.assert_close(written[name], weight, rtol=2**-7, atol=0)

    trainer = run_trainer(files, tmp_path, None, anchors=500)
    assert trainer.progress.anchors >= 500
    assert len(trainer.progress.history[-1]["accuracy"]) == VALIDATION_STEPS
    written = load_file(tmp_path / "draft" / WEIGHTS_FILE)
    assert not any(torch.allclose(written[name], weight, rtol=2**-7) for name, weight in begun.items())


def test_rows_of_a_loss_fill_tiles_and_hold_all_wanted_tokens() -> None:
    wanted, drawn = torch.arange(100, 350, 2), torch.arange(300, 5000, 7)
    rows = with_others(wanted, drawn, 32)
    assert len(rows) % 32 == 0
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert set(wanted.tolist()) <= set(rows.tolist()) <= {*wanted.tolist(), *drawn.tolist()}


def test_no_token_of_a_batch_is_left_out_of_its_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_directory(tmp_path / "model")
    spec = validate_model_files(files)
    conversations = [Conversation(1, 40, np.arange(100, 190, dtype=np.int32))]
    write_shard(tmp_path, conversations, [torch.randn(90, 4 * spec.hidden_size).bfloat16()])
    (batch,) = Dataset(shard_paths(tmp_path), 4 * spec.hidden_size, spec.hidden_size).batches(
        1000, 3, np.random.default_rng(0)
    )
    wanted: list[set[int]] = []

    def recorded(token_ids: torch.Tensor, others: torch.Tensor, tile: int) -> torch.Tensor:
        wanted.append(set(token_ids.tolist()))
        return with_others(token_ids, others, tile)

    monkeypatch.setattr("evospec.adapters.training.learner.with_others", recorded)
    target = target_parts(open_weights(files), spec, 256, torch.float32)
    learner = Learner(random_draft(files).requires_grad_(True), target)
    learner.step(batch, torch.tensor([3, 4]), num_steps=1, rate=1e-3, number=0)
    assert wanted == [{*batch.token_ids.flatten().tolist(), 3, 4}]


def test_windows_that_go_on_are_unrolled_as_if_alone(tmp_path: Path) -> None:
    files = make_directory(tmp_path / "model")
    spec, weights = validate_model_files(files), open_weights(files)
    torch.manual_seed(0)
    conversations = [
        Conversation(key, 40, np.random.default_rng(key).integers(spec.vocab_size, size=90, dtype=np.int32))
        for key in (1, 2, 3)
    ]
    write_shard(tmp_path, conversations, [torch.randn(90, 4 * spec.hidden_size).bfloat16() for _ in conversations])
    dataset = Dataset(shard_paths(tmp_path), 4 * spec.hidden_size, spec.hidden_size)
    (batch,) = dataset.batches(1000, 3, np.random.default_rng(0))
    target = target_parts(weights, spec, 256, torch.float32)
    draft = random_draft(files)
    expected = unrolled_from_all(draft, target, draft.fuse(batch.features.float()), batch.token_ids, batch.positions, 3)
    unroller = Unroller(draft, target)
    walk, further = unroller.walk(batch), torch.tensor([True, False, True])
    for step in range(3):
        if step:
            walk.advance(further[walk.rows] & (batch.lengths[walk.chains] > step))
            of_rows = [int((walk.rows == row).sum()) for row in range(3)]
            assert of_rows == [90 - TEMPLATE_TOKENS - step, 0, 90 - TEMPLATE_TOKENS - step]
        assert torch.equal(walk.ends, batch.starts[walk.chains] % batch.length + step)
        torch.testing.assert_close(walk.head_input, expected[step].flatten(0, 1)[batch.starts[walk.chains]])
    loss, means = unroller.loss(batch, target.head[:100], (1.0, 0.5))
    torch.testing.assert_close(float(loss.detach()), (means[0] + 0.5 * means[1]) / 1.5)


def test_chains_from_some_positions_are_those_from_all(tmp_path: Path) -> None:
    """States and gradients; chains of different lengths, a segment without chains, and one that is shorter."""
    files = make_directory(tmp_path / "model")
    spec, weights = validate_model_files(files), open_weights(files)
    torch.manual_seed(0)
    draft, target = random_draft(files), target_parts(weights, spec, 256, torch.float32)
    g = torch.randn(3, 50, spec.hidden_size)
    token_ids, positions = torch.randint(spec.vocab_size, (3, 54)), torch.arange(7, 57).repeat(3, 1)
    g[2, 40:], token_ids[2, 40:], positions[2, 40:] = 0, 0, 0  # padding
    g.requires_grad_()
    starts = torch.tensor([0, 3, 4, 49, 100, 131, 132])
    batch = ChainBatch(token_ids, positions, starts)
    learned = [g, draft.qkv_proj.weight.requires_grad_(), draft.down_proj.weight.requires_grad_()]
    unrolled = unrolled_from_all(draft, target, g, token_ids, positions, 4)
    from_all = [step.flatten(0, 1)[starts] for step in unrolled]
    for wanted in ([4] * 7, [1, 4, 3, 1, 2, 3, 1], [1, 2, 1, 1, 1, 1, 1]):
        lengths = torch.tensor(wanted)
        walk = ChainWalk(draft, target, batch, g)
        found, expected = [walk.head_input], [from_all[0]]
        for number in range(1, max(wanted)):
            walk.advance(lengths[walk.chains] > number)
            assert torch.equal(walk.chains, (lengths > number).nonzero().flatten())
            found.append(walk.head_input)
            expected.append(from_all[number][walk.chains])
        ours, theirs = torch.cat(found), torch.cat(expected)
        torch.testing.assert_close(ours, theirs)
        counts = torch.randn_like(ours)
        for one, other in zip(
            torch.autograd.grad((ours * counts).sum(), learned),
            torch.autograd.grad((theirs * counts).sum(), learned, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_draft_of_another_shape_is_no_start(tmp_path: Path) -> None:
    files = make_directory(tmp_path / "model")
    start = make_draft_directory(tmp_path / "start", files)
    with pytest.raises(ModelError, match="shape"):
        run_trainer(files, tmp_path, start, anchors=0, width=256)


def training_jobs(directory: Path) -> list[Job]:
    """Two rounds of ten prompts."""
    path = directory / "prompts.jsonl"
    domains = ["code", "general", "law", "medicine"] * 5
    path.write_text(
        "\n".join(
            json.dumps(
                {"id": str(n), "domain": domain, "split": "train", "messages": [{"role": "user", "content": f"{n}?"}]}
            )
            for n, domain in enumerate(domains)
        )
    )
    return list(jobs_of(read_prompts(path), rounds=2))


def test_only_prompts_of_wanted_domains_that_were_not_answered_are_left(tmp_path: Path) -> None:
    jobs = training_jobs(tmp_path)
    assert len(jobs) == 20  # two rounds, without law and medicine
    answered = next(job for job in jobs[4:] if job.domain == "general")
    left = list(left_of(jobs, 4, ["general"], {answered.key}))
    assert left == [job for job in jobs[4:] if job.domain == "general" and job != answered]
    assert left


def test_what_another_model_answered_is_read(tmp_path: Path, smollm2_path: Path) -> None:
    """Each prompt with its own answer; those that the other has not answered are left out."""
    tokenizer, jobs = Tokenizer.from_files(resolve_model(ModelConfig())), training_jobs(tmp_path)
    answers = {jobs[3].key: "Blood is red.", jobs[11].key: "def f(): ...", jobs[12].key: ""}
    conversations = [
        Conversation(key, 2, np.array([1, 2, *tokenizer.encode(text)], dtype=np.int32)) for key, text in answers.items()
    ]
    write_shard(tmp_path, conversations, [torch.zeros(len(c.token_ids), WIDTH).bfloat16() for c in conversations])
    read = list(answered_by(tmp_path, tokenizer, jobs))
    assert [job.given for job in read] == ["Blood is red.", "def f(): ..."]
    assert [job.key for job in read] == [jobs[3].key, jobs[11].key]
