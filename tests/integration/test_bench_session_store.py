"""The benchmark of many sessions, with few of them."""

from __future__ import annotations

from benchmarks.session_store import filled, measure, table
from evospec.engine.messages import EngineReady
from tests.integration.snapshots import snapshot_of
from tests.tiny_models import VOCAB_SIZE, VOCABULARY

ENGINE = EngineReady(
    epoch="e", model="tiny", max_model_len=64, vocab_size=VOCAB_SIZE, num_blocks=8, block_size=16, max_num_seqs=4,
    dtype="float32", attention_backend="none", vocabulary=VOCABULARY,
)  # fmt: skip


async def test_sessions_are_made_loaded_and_saved(valkey_url: str) -> None:
    snapshots = [snapshot_of(range(300)), snapshot_of(range(3))]
    async with filled(valkey_url, ENGINE, snapshots, count=40, num_tenants=3) as side:
        [result] = await measure([side], requests=60, levels=[1, 4])
    assert result["sessions"] == 40
    assert result["bytes_a_session"] > sum(map(len, snapshots)) / 2
    assert result["making"]["operations"] == 40
    for row in result["levels"].values():
        assert (row["operations"], row["failed"]) == (60, 0)
        for times in (row["load"], row["save"]):
            assert times[0] > 0
            assert times == sorted(times)
    assert table(result).row_count == 2
