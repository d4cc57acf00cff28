"""Fleets of 10, 1,000 and 100,000 replicas, each with cores of its own."""

from __future__ import annotations

import numpy as np

from benchmarks.fleet.simulation.figures import figures, redis_figures
from benchmarks.fleet.simulation.fleet import Fleet
from benchmarks.fleet.simulation.replica import Costs
from benchmarks.fleet.simulation.ring import Anywhere, Drawn, Router, shares
from benchmarks.fleet.simulation.traces import Scale, make_conversations, read_conversations
from evospec.engine.adapters_config import AdaptersConfig
from evospec.server.options import SessionsConfig

RINGS: tuple[tuple[int, str, int | None], ...] = (
    (10, "no affinity", None),
    (10, "1,024 places", 1024),
    (1_000, "1,024 places", 1024),
    (1_000, "100 places each", 100_000),
    (100_000, "1,024 places", 1024),
    (100_000, "100 places each", 10_000_000),
)
"""Replicas, what the ring is called, and Envoy's ``minimum_ring_size``."""
_SAMPLE = 12
"""Replicas that are simulated of a larger fleet: those in the middle of as many equal parts, by their share."""
_TENANTS_EACH = 10
"""Tenants for each replica. The n-th of them sends 1/n as much as the first: no trace tells."""
_WORKER_CALLS, _CALLS_A_KEY = 8, 2
"""Commands a second of a worker, and of each key that it looks after, as counted with a Valkey."""
_ADAPTER_BYTES = 405_000
"""Of SmolLM2's, which each replica that knows the key reads."""


_RATE = 0.5
"""Conversations that begin at a replica each second."""
_SECONDS, _WARM_UP = 800.0, 400.0
"""Figures are of the time after the latter."""
_NUM_BLOCKS = 5825


def serve(costs: Costs, size: int, ring_size: int | None) -> dict[str, float]:
    """What sessions notice with so many replicas; ``ring_size`` None: any replica serves any request."""
    sample, scale = min(size, _SAMPLE), Scale()
    router: Router = Anywhere(sample)
    spread = 1.0
    if ring_size is not None:
        parts = np.array(shares(size, ring_size))
        spread = float(parts[-1])
        router = Drawn(parts[((np.arange(sample) + 0.5) * size / sample).astype(int)].tolist())
    fleet = Fleet(costs, _NUM_BLOCKS, router, range(sample), 2.0, scale, {})
    conversations = make_conversations(_RATE * sample, _SECONDS, scale)
    served = fleet.run(conversations, [f"tenant {number}" for number in range(_TENANTS_EACH * sample)])
    late = [one for one in served if one.start >= _WARM_UP]
    busy = [machine.busy[True] / _SECONDS for machine in fleet.machines]
    return figures(late) | {
        "requests_a_second": len(late) / (_SECONDS - _WARM_UP) / sample * size,
        "sessions_a_request": sum(one.turn == 0 for one in late) / len(late),
        "largest_share": spread,
        "busy_mean": float(np.mean(busy)),
        "busy_most": float(np.max(busy)),
        **redis_figures(served, costs),
    }


def shared(served: dict[str, float], size: int, call_seconds: float) -> dict[str, float]:
    """What Redis and the learners have to do for a fleet."""
    sessions, requests = SessionsConfig(), served["requests_a_second"]
    rates = 1 / np.arange(1, _TENANTS_EACH * size + 1)
    rates *= requests / rates.sum()
    pauses = np.sort([turn.pause for turns in read_conversations(Scale()) for turn in turns[1:]])
    # The session that a tenant used longest ago goes when it has too many: a turn finds its own if fewer came since.
    found = np.searchsorted(pauses, sessions.max_per_tenant / rates) / len(pauses)
    kept = np.minimum(rates * sessions.ttl_seconds * served["sessions_a_request"], sessions.max_per_tenant).sum()
    calls, polls = requests * served["redis_calls"], size * (_WORKER_CALLS + AdaptersConfig().num_slots * _CALLS_A_KEY)
    of_largest = size * -np.expm1(-rates[0] * 3600 / size)
    return {
        "calls_a_second": calls,
        "megabytes_a_second": requests * (served["redis_in"] + served["redis_out"]) / 1e6,
        "cores": calls * call_seconds,
        "largest_tenant_cores": calls * call_seconds * rates[0] / requests,
        "sessions_found": float((found * rates).sum() / requests),
        "gigabytes_kept": kept * served["redis_in"] / 1e9,
        "learner_calls_a_second": polls,
        "learner_cores": polls * call_seconds,
        "tenants_a_minute": float(-np.expm1(-rates * 60 / size).sum()),
        "replicas_of_largest_tenant": of_largest,
        "gigabytes_a_version": of_largest * _ADAPTER_BYTES / 1e9,
    }
