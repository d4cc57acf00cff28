"""What deploy/ has for Kubernetes and Docker Compose: rendered by their own tools, checked against their schemas."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from evospec.server.options import HttpConfig
from evospec.server.settings import load_settings

DEPLOY = Path(__file__).parents[2] / "deploy"
KEYS = "acme=" + "0" * 64


def needs(program: str) -> pytest.MarkDecorator:
    missing = shutil.which(program) is None and "CI" not in os.environ
    return pytest.mark.skipif(missing, reason=f"{program} is not installed (Debian package {program})")


@functools.cache
def rendered(folder: str) -> dict[tuple[str, str], Any]:
    """What ``kubectl apply --kustomize deploy/kubernetes/FOLDER`` applies, by kind and name."""
    command = ["kustomize", "build", str(DEPLOY / "kubernetes" / folder)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout
    return {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(output)}


def server_pod(folder: str) -> Any:
    return rendered(folder)["StatefulSet", "evospec"]["spec"]["template"]["spec"]


def settings_of(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return load_settings()


@needs("kustomize")
@pytest.mark.parametrize("folder", ["base", "monitored"])
def test_manifests_satisfy_the_schemas_of_kubernetes(folder: str) -> None:
    foreign = [("ServiceMonitor", "evospec")] if folder == "monitored" else []
    for name, manifest in rendered(folder).items():
        if name not in foreign:
            kubernetes_validate.validate(manifest, "1.30", strict=True)


@needs("kustomize")
def test_a_mistake_in_a_manifest_is_found() -> None:
    broken = {**rendered("base")["Service", "evospec"], "spek": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.30", strict=True)


@needs("kustomize")
def test_pods_have_time_to_finish_and_are_locked() -> None:
    pod = server_pod("base")
    [container] = pod["containers"]
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > HttpConfig().drain_timeout + pause
    probed = {name: each["httpGet"]["path"] for name, each in container.items() if name.endswith("Probe")}
    assert probed == {"startupProbe": "/health", "readinessProbe": "/health", "livenessProbe": "/"}
    for name in ("evospec", "evospec-valkey"):
        spec = rendered("base")["StatefulSet", name]["spec"]["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["containers"][0]["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


@needs("kustomize")
def test_pods_have_options_that_exist_and_ports_that_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    [container] = server_pod("base")["containers"]
    [options] = [each["data"] for (kind, _), each in rendered("base").items() if kind == "ConfigMap"]
    settings = settings_of({**options, "EVOSPEC_AUTH__KEYS": KEYS}, monkeypatch)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": settings.http.port, "metrics": int(settings.http.metrics_address.rpartition(":")[2])}
    [valkey] = rendered("base")["Service", "evospec-valkey"]["spec"]["ports"]
    assert settings.redis.url == f"redis://evospec-valkey:{valkey['port']}"
    [reference] = [each["configMapRef"]["name"] for each in container["envFrom"] if "configMapRef" in each]
    assert ("ConfigMap", reference) in rendered("base")


@needs("kustomize")
def test_what_refers_to_the_servers_finds_them() -> None:
    manifests = rendered("monitored")
    server = manifests["StatefulSet", "evospec"]["spec"]
    labels = server["template"]["metadata"]["labels"]
    for kind, name in [("Service", "evospec"), ("Service", "evospec-replicas")]:
        selected = manifests[kind, name]["spec"]
        assert selected["selector"].items() <= labels.items()
        assert {port["targetPort"] for port in selected["ports"]} <= {"http", "metrics"}
    assert manifests["PodDisruptionBudget", "evospec"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert manifests["NetworkPolicy", "evospec"]["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    assert server["serviceName"] == "evospec-replicas"
    scraping, service = manifests["ServiceMonitor", "evospec"]["spec"], manifests["Service", "evospec-replicas"]
    assert scraping["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert service["metadata"]["labels"][scraping["jobLabel"]] == "evospec"  # the job that alerts and dashboards name
    assert scraping["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}


@needs("kustomize")
def test_the_autoscaler_counts_the_queue() -> None:
    spec = rendered("monitored")["HorizontalPodAutoscaler", "evospec"]["spec"]
    adapter = yaml.safe_load((DEPLOY / "kubernetes/monitored/prometheus-adapter.yaml").read_text())
    [rule] = adapter["rules"]["custom"]
    assert spec["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]
    assert rule["seriesQuery"].startswith("vllm:num_requests_waiting{")
    assert "replicas" not in rendered("monitored")["StatefulSet", "evospec"]["spec"]


@needs("docker-compose")
def test_compose_satisfies_its_schema_and_names_options_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["docker-compose", "--file", "compose.yaml", "--profile", "monitoring", "config"]
    environment = {**os.environ, "EVOSPEC_KEYS": KEYS}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=DEPLOY, env=environment, timeout=60).stdout
    server = yaml.safe_load(output)["services"]["evospec"]
    settings = settings_of(server["environment"], monkeypatch)
    assert server["ports"][0]["target"] == settings.http.port
    assert server["stop_grace_period"] == "40s"
    assert settings.http.drain_timeout < 40
