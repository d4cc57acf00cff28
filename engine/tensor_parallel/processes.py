"""The processes of ranks 1 and up: ``python -m evospec.engine.tensor_parallel.processes RANK PORT PARENT``.

The engine, which is rank 0, starts them. All ranks live and die together: where one ends, the engine does too, and its
supervisor starts it again, with new ones; where the engine ends, however it does, the kernel kills the others.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import structlog
import torch

from evospec.engine.config import CONFIG_VARIABLE, EngineConfig
from evospec.engine.loader import LoadedModel, choose_device, load
from evospec.engine.log import configure_logging_from_environment
from evospec.engine.models.config import ModelError, ModelFiles, ModelSpec
from evospec.engine.models.registry import resolve_model, validate_model_files
from evospec.engine.tensor_parallel.model import Shard, ShardedModel
from evospec.engine.tensor_parallel.ranks import LOOPBACK, Ranks, ends_with_the_group

log = structlog.get_logger(__name__)

_PR_SET_PDEATHSIG = 1


def load_target(config: EngineConfig, files: ModelFiles, spec: ModelSpec) -> LoadedModel:
    """Load the target on as many ranks as the configuration wants, of which this process is rank 0.

    Raises:
        ModelError: as ``load`` does, or there are fewer GPUs than ranks.
    """
    if config.runtime.tensor_parallel_size == 1:
        return load(config, files, spec)
    spec.share(config.runtime.tensor_parallel_size)  # or nothing is started
    ranks = _start_ranks(config)
    loaded = load(config, files, spec, ranks=ranks)
    model = ShardedModel(Shard(loaded, config.cache, ranks))
    return replace(loaded, model=model, all_ranks=model)


def _start_ranks(config: EngineConfig) -> Ranks:
    """Start the other ranks, and make the group; they load their shares of the model by themselves."""
    size, device_type = config.runtime.tensor_parallel_size, choose_device(config.runtime).type
    if device_type == "cuda" and torch.cuda.device_count() < size:
        raise ModelError(f"runtime.tensor_parallel_size is {size}, but there are {torch.cuda.device_count()} GPUs")
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    sections = {"model", "cache", "runtime"}  # all that decides what they compute
    environment = {**os.environ, CONFIG_VARIABLE: config.model_dump_json(include=sections)}
    for rank in range(1, size):
        command = [sys.executable, "-m", __spec__.name, str(rank), str(port), str(os.getpid())]
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
        log.info("rank started", rank=rank, pid=process.pid)
        threading.Thread(target=_end_with, args=(rank, process), daemon=True).start()
    return Ranks(0, size, device_type, port, listener.detach())


def _end_with(rank: int, process: subprocess.Popen[bytes]) -> None:
    """End this process when that of a rank ends: at once, as a collective on a GPU may wait for it for ever."""
    status = process.wait()
    log.critical("a rank has died, and the engine ends with it", rank=rank, pid=process.pid, exit_status=status)
    os._exit(1)


def main() -> None:
    """Load a rank's share of the model, then compute what rank 0 calls for."""
    rank, port, parent = map(int, sys.argv[1:])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has died before it could be known here
        sys.exit(1)
    configure_logging_from_environment()
    config = EngineConfig.model_validate_json(os.environ[CONFIG_VARIABLE])
    size, device_type = config.runtime.tensor_parallel_size, choose_device(config.runtime).type
    with ends_with_the_group():
        ranks = Ranks(rank, size, device_type, port)
    try:
        files = resolve_model(config.model, progress=False)
        loaded = load(config, files, validate_model_files(files), ranks=ranks)
    except ModelError as error:
        log.error("the model cannot be served", reason=str(error), rank=rank)
        sys.exit(1)
    with ends_with_the_group():
        Shard(loaded, config.cache, ranks).follow()


if __name__ == "__main__":
    main()
