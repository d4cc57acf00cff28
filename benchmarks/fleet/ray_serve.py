"""A Ray cluster of several nodes on this machine, with this project's application of Ray Serve."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.schema import ApplicationStatus

from benchmarks.common.machine import REPOSITORY
from benchmarks.common.process import START_TIMEOUT, free_port
from benchmarks.fleet.processes import REPLICA_OPTIONS, Process, Router, is_healthy

_CONFIGURATION = REPOSITORY / "deploy" / "ray" / "serve.yaml"
_GONE_SECONDS = 10.0


class RayRouter(Router):
    """As many replicas in place of those that are there, each on a node of its own.

    ``autoscaling``: options that differ from serve.yaml's, for one to as many replicas; None: always as many.
    """

    def __init__(
        self,
        replicas: Sequence[Process],
        directory: Path,
        redis_url: str,
        autoscaling: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(replicas, directory, redis_url)
        self._autoscaling = autoscaling

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        await asyncio.gather(*(replica.stop() for replica in self.replicas))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        try:
            for _ in self.replicas[1:]:
                cluster.add_node(num_cpus=1)
            self._address, self._port = cluster.address, free_port()
            ray.init(self._address, log_to_driver=False)
            await self._deploy(drain_timeout=30)
            yield f"http://127.0.0.1:{self._port}"
        finally:
            ray.shutdown()
            cluster.shutdown()

    async def kill(self, number: int) -> None:
        self._processes()[0].kill()  # the one whose turn it is: a new one comes last
        await asyncio.sleep(_GONE_SECONDS)
        while len(self._processes()) < len(self.replicas):  # noqa: ASYNC110  # Ray may not have noticed yet
            await asyncio.sleep(0.5)
        await self._until_all_run()

    async def update(self) -> None:
        old = self._processes()
        await self._deploy(drain_timeout=29)
        while any(process.is_running() for process in old):  # noqa: ASYNC110
            await asyncio.sleep(0.5)
        await self._until_all_run()

    async def _deploy(self, drain_timeout: int) -> None:
        """What ``serve run`` does with the configuration, of as many replicas; with another option it is an update."""
        configuration = yaml.safe_load(_CONFIGURATION.read_text())
        configuration["proxy_location"] = "HeadOnly"  # all nodes are one machine
        configuration["http_options"]["port"] = self._port
        [application] = configuration["applications"]
        options = [*REPLICA_OPTIONS, "--redis.url", self.redis_url, "--http.drain_timeout", str(drain_timeout)]
        application["args"] = {"options": shlex.join(options)}
        deployment = next(one for one in application["deployments"] if one["name"] == "Replica")
        deployment["ray_actor_options"] = {"num_cpus": 1}
        scaling = deployment.pop("autoscaling_config")
        if self._autoscaling is None:
            deployment["num_replicas"] = len(self.replicas)
        else:
            bounds = {"min_replicas": 1, "max_replicas": len(self.replicas)}
            deployment["autoscaling_config"] = scaling | bounds | self._autoscaling
        path = self.directory / "serve.yaml"
        path.write_text(yaml.safe_dump(configuration))
        program = str(Path(sys.executable).parent / "serve")
        arguments = ["run", str(path), "--non-blocking", "--address", self._address, "--app-dir", str(REPOSITORY)]
        process = await asyncio.create_subprocess_exec(program, *arguments)
        if await process.wait():
            raise RuntimeError(f"{program} {' '.join(arguments)} failed")
        await self._until_all_run()

    async def _until_all_run(self) -> None:
        async with asyncio.timeout(START_TIMEOUT * len(self.replicas)):  # an update starts one after the other
            while True:
                application = serve.status().applications["evospec"]
                if application.status == ApplicationStatus.DEPLOY_FAILED:
                    raise RuntimeError(application.message)
                if replica_states() == {"RUNNING": len(self.replicas) if self._autoscaling is None else 1}:
                    break
                await asyncio.sleep(0.5)
        while not await is_healthy(f"http://127.0.0.1:{self._port}"):  # noqa: ASYNC110
            await asyncio.sleep(0.1)

    def _processes(self) -> list[psutil.Process]:
        """Of the replicas of this process's clusters, the oldest first."""
        name = "ray::ServeReplica:evospec:Replica"
        found = [one for one in psutil.process_iter(["cmdline"]) if (one.info["cmdline"] or [""])[0].startswith(name)]
        return sorted(found, key=lambda process: process.create_time())


def replica_states() -> dict[str, int]:
    """How many replicas there are, by what they are about."""
    deployment = serve.status().applications["evospec"].deployments.get("Replica")
    return dict(deployment.replica_states) if deployment else {}
