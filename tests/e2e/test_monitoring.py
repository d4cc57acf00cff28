"""A whole server under load, scraped by a real Prometheus: no panel of a dashboard may be empty."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
import torch
from redis import Redis

from benchmarks.dashboards import DASHBOARDS, Prometheus, query_panels
from evospec.adapters.alignment.store import AdapterStore
from evospec.engine.adapters_config import AdaptersConfig
from evospec.engine.models.eagle3 import load_draft
from evospec.engine.models.lora import draft_fingerprint, lora_layout
from evospec.engine.speculation.draft_files import DRAFTS
from evospec.server.session_ids import session_key
from evospec.server.tenants import hash_key
from tests.running_prometheus import BINARY, running_prometheus
from tests.running_server import EXPERIMENTS, RunningServer
from tests.tiny_models import make_directory

TENANTS = {"acme": "secret-a", "beta": "secret-b"}
KEYS = {**TENANTS, "prometheus": "secret-p"}
ADMIN = "secret-o"
TAKEN_BACK = "beta"
FIRING = ["EvoSpecAdapterTakenBack", "EvoSpecSnapshotsDropped"]
MODEL = "smollm2-135m"
# Of subjects whose words are not among the most frequent, so that they can only be drafted from a tail.
PROMPTS = {
    None: "The three primary colours are",
    "law": "The plaintiff alleged that the indemnity clause was unconscionable. The appellate court held that",
    "medicine": "Pericarditis, endocarditis and myocarditis: pericarditis is the inflammation of the",
}
RATE_INTERVAL = "10s"  # sequences are counted when they end, which on a busy machine is every few seconds
VLLM_QUERIES = (
    [
        f"sum by (model_name, engine) (rate(vllm:{name}[{RATE_INTERVAL}])) > 0"
        for name in (
            "prompt_tokens_total",
            "generation_tokens_total",
            "request_success_total",
            "request_queue_time_seconds_count",
            "request_prefill_time_seconds_sum",
            "request_decode_time_seconds_sum",
            "request_prompt_tokens_sum",
            "request_generation_tokens_sum",
            "request_max_num_generation_tokens_sum",
            "iteration_tokens_total_sum",
            "spec_decode_num_drafts_total",
            "spec_decode_num_draft_tokens_total",
            "spec_decode_num_accepted_tokens_total",
            "spec_decode_num_accepted_tokens_per_pos_total{position='0'}",
        )
    ]
    + [
        f"histogram_quantile(0.99, sum by (le) (rate(vllm:{name}_bucket[{RATE_INTERVAL}])))"
        for name in (
            *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
            *("request_time_per_output_token_seconds", "request_prompt_tokens"),
        )
    ]
    + ["vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting"]
)
"""What vLLM's dashboards ask for."""
WAIT_SECONDS = 120.0
KNOWN_RECORDS = 300
NEEDS_PROMETHEUS = pytest.mark.skipif(
    BINARY is None and "CI" not in os.environ, reason="prometheus is not installed (Debian package prometheus)"
)


@contextmanager
def load(base_url: str, redis: Redis) -> Iterator[None]:
    """Three clients of each tenant, until the end of the block: one without a session and two with one each.

    Something keeps damaging the sessions of medicine in Redis.
    """
    stop = Event()

    def client(tenant: str, domain: str | None) -> None:
        body: dict[str, object] = {"model": MODEL, "prompt": PROMPTS[domain], "max_tokens": 24}
        with httpx.Client(
            base_url=base_url, headers={"Authorization": f"Bearer {TENANTS[tenant]}"}, timeout=60
        ) as http:
            if domain is not None:
                session = http.post("/v1/sessions", json={"domain": domain}).raise_for_status().json()["id"]
                body["session_id"] = session
            while not stop.is_set():
                http.post("/v1/completions", json=body).raise_for_status()
                if domain == "medicine":
                    redis.hset(session_key(tenant, MODEL, session), "snapshot", b"damaged")

    with ThreadPoolExecutor(len(TENANTS) * len(PROMPTS)) as pool:
        clients = [pool.submit(client, tenant, domain) for tenant in TENANTS for domain in PROMPTS]
        try:
            yield
        finally:
            stop.set()
        for future in clients:
            future.result()


def alignment_options(directory: Path) -> dict[str, str]:
    """A worker that takes what it needs to learn within seconds, and takes nothing back."""
    return {
        f"engine.alignment.{option}": value
        for option, value in {
            "shared_directory": str(directory / "shared"),
            "state_directory": str(directory / "state"),
            "log.stream": f"log:{directory.name}",
            "log.sample_share": "1.0",
            "log.cost_share": "1.0",
            "log.control_share": "0.4",
            "pace.first_steps": "0",
            "training.batch_positions": "16",
            "guard.sigmas": "20",
            "guard.min_held_out": "64",
            "training.updates_per_version": "8",
            "pace.niceness": "0",
            "pace.spare_cores": "0",
            "pace.step_seconds": "10",
        }.items()
    }


def seed_adapters(directory: Path) -> None:
    """A good version of each tenant's adapter, without effect: something is in force from the first records on."""
    config, base = AdaptersConfig(), draft_fingerprint(DRAFTS / MODEL)
    draft = load_draft(DRAFTS / MODEL, torch.float32, torch.device("cpu"))
    layout = lora_layout(draft.config, config.rank, config.targets, base)
    store = AdapterStore(directory / "state" / base[:16], layout)
    for tenant in TENANTS:
        state = store.load_state(tenant)
        tensors = {spec.name: torch.zeros(spec.shape, dtype=spec.dtype) for spec in layout.tensors}
        state.good_revision = store.save(state, tensors)
        store.save_state(state)


def take_back_adapter(server: RunningServer) -> None:
    """As an operator does, once enough is known of it: then there is a version before the one in force."""
    with httpx.Client(base_url=server.base_url, headers={"Authorization": f"Bearer {ADMIN}"}, timeout=60) as http:

        def is_known() -> bool | None:
            answer = http.get("/v1/adapters")
            if answer.status_code == 503:  # so busy is the machine that Redis is late
                return None
            adapters = answer.raise_for_status().json()["data"]
            records = {each["key"]: each["status"]["num_records"] for each in adapters}
            return records.get(TAKEN_BACK, 0) > KNOWN_RECORDS or None

        server.wait_for(is_known, "records of an adapter")
        http.post(f"/v1/adapters/{TAKEN_BACK}/rollback").raise_for_status()


def rules(prometheus: Prometheus) -> list[dict[str, Any]]:
    return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]


def firing(prometheus: Prometheus) -> list[str]:
    """Names of the alerts that fire."""
    return [rule["name"] for rule in rules(prometheus) if rule.get("state") == "firing"]


def empty_queries(prometheus: Prometheus) -> list[str]:
    """Queries of all dashboards without a number in their newest seconds."""
    now = time.time()
    empty = []
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in query_panels(json.loads(path.read_text())):
            for target in panel["targets"]:
                series = prometheus.panel({"targets": [target]}, now - 3, now, RATE_INTERVAL)
                if all(math.isnan(value) for each in series for value in each.values):
                    empty.append(f"{path.stem}: {panel['title']}: {target['expr']}")
    return empty


def counted(prometheus: Prometheus, metric: str) -> set[tuple[str, str | None]]:
    """The tenants and domains of a counter."""
    found = prometheus.get("query", query=f"sum by (tenant, domain) (evospec:{metric}_total)")["result"]
    return {(each["metric"]["tenant"], each["metric"].get("domain")) for each in found}


@NEEDS_PROMETHEUS
def test_no_panel_is_empty_under_load(
    launch_server: Callable[..., RunningServer], valkey_url: str, free_port: int, tmp_path: Path
) -> None:
    # Drafts are made whether they pay or not. Two sequences at a time make the others queue.
    options = {
        "auth.keys": ",".join(f"{tenant}={hash_key(key)}" for tenant, key in KEYS.items()),
        "auth.admin_key": hash_key(ADMIN),
        "redis.url": valkey_url,
        "engine.model.max_model_len": "1024",
        "engine.scheduler.max_num_seqs": "2",
        "engine.speculation.method": "auto",
        "engine.speculation.vocabulary": "dynamic:4096+1024",
        **alignment_options(tmp_path),
    }
    seed_adapters(tmp_path)
    arguments = [word for option, value in options.items() for word in (f"--{option}", value)]
    server = launch_server(*arguments, program=EXPERIMENTS)
    with (
        Redis.from_url(valkey_url) as redis,
        running_prometheus([server.base_url], free_port, tmp_path, KEYS["prometheus"]) as prometheus,
        load(server.base_url, redis),
    ):
        take_back_adapter(server)
        deadline = time.monotonic() + WAIT_SECONDS
        while (empty := empty_queries(prometheus)) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert empty == []
        server.wait_for(lambda: firing(prometheus) == FIRING or None, f"{FIRING} to fire, and nothing else")
        assert {rule["health"] for rule in rules(prometheus)} == {"ok"}
        everybody = {(tenant, domain) for tenant in TENANTS for domain in PROMPTS}
        for metric in ("spec_decode_num_drafts", "vocab_verified_tokens"):
            server.wait_for(lambda: counted(prometheus, metric) == everybody or None, f"{metric} of everybody")  # noqa: B023
        for query in VLLM_QUERIES:
            (found,) = prometheus.get("query", query=query)["result"]
            assert math.isfinite(float(found["value"][1])), query


@NEEDS_PROMETHEUS
def test_several_servers_are_scraped_and_a_panel_shows_them_together(
    launch_server: Callable[..., RunningServer], free_port: int, tmp_path: Path
) -> None:
    model = make_directory(tmp_path / "tiny").path
    servers = [launch_server("--model", str(model), "--http.metrics_address", "127.0.0.1:0") for _ in range(2)]
    for number, server in enumerate(servers, 1):
        body = {"model": model.name, "prompt": PROMPTS[None], "max_tokens": 8 * number, "min_tokens": 8 * number}
        httpx.post(f"{server.base_url}/v1/completions", json=body, timeout=60).raise_for_status()
    listeners = [str(server.wait_for_event("metrics")["url"]) for server in servers]
    with running_prometheus(listeners, free_port, tmp_path) as prometheus:

        def value(query: str) -> str | None:
            return next((found["value"][1] for found in prometheus.get("query", query=query)["result"]), None)

        servers[0].wait_for(lambda: value('sum(up{job="evospec"})') == "2" or None, "both to be scraped")
        servers[0].wait_for(lambda: value("sum(evospec:generation_tokens_total)") == "24" or None, "tokens of both")
        now = time.time()
        for path in sorted(DASHBOARDS.glob("*.json")):
            for panel in query_panels(json.loads(path.read_text())):
                legends = [series.legend for series in prometheus.panel(panel, now - 3, now, RATE_INTERVAL)]
                assert len(legends) == len(set(legends)), f"{path.stem}: {panel['title']}: {legends}"
