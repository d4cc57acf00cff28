"""A Ray cluster of several nodes on this machine, with this project's application of Ray Serve."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import AsyncIterator
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
from benchmarks.fleet.processes import REPLICA_OPTIONS, is_healthy
from benchmarks.fleet.router import Router

_CONFIGURATION = REPOSITORY / "deploy" / "ray" / "serve.yaml"
_GONE_SECONDS = 10.0


class RayRouter(Router):
    """As many replicas in place of those that are there, each on a node of its own."""

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
        [deployment] = application["deployments"]
        del deployment["autoscaling_config"]
        deployment |= {"num_replicas": len(self.replicas), "ray_actor_options": {"num_cpus": 1}}
        path = self.directory / "serve.yaml"
        path.write_text(yaml.safe_dump(configuration))
        program = str(Path(sys.executable).parent / "serve")
        arguments = ["run", str(path), "--non-blocking", "--address", self._address, "--app-dir", str(REPOSITORY)]
        process = await asyncio.create_subprocess_exec(program, *arguments)
        if await process.wait():
            raise RuntimeError(f"{program} {' '.join(arguments)} failed")
        await self._until_all_run()

    async def _until_all_run(self) -> None:
        async with asyncio.timeout(START_TIMEOUT):
            while True:
                application = serve.status().applications["evospec"]
                if application.status == ApplicationStatus.DEPLOY_FAILED:
                    raise RuntimeError(application.message)
                deployment = application.deployments.get("Replica")
                states = deployment.replica_states if deployment else {}
                if states == {"RUNNING": len(self.replicas)}:
                    break
                await asyncio.sleep(0.5)
        while not await is_healthy(f"http://127.0.0.1:{self._port}"):  # noqa: ASYNC110
            await asyncio.sleep(0.1)

    def _processes(self) -> list[psutil.Process]:
        """Of the replicas of this process's clusters, the oldest first."""
        found = [one for one in psutil.process_iter(["cmdline"]) if _is_replica(one.info["cmdline"])]
        return sorted(found, key=lambda process: process.create_time())


def _is_replica(words: list[str] | None) -> bool:
    return (words or [""])[0].startswith("ray::ServeReplica:evospec:Replica")
