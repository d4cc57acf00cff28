"""The group of processes that compute one model together, over ``torch.distributed``: NCCL on GPUs, gloo on CPUs.

Rank 0 is the engine: it alone schedules, drafts and samples. It says what is computed next, and all ranks compute it,
each with its share of the weights.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import reduce

import msgspec
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

LOOPBACK = "127.0.0.1"
_HEADER_BYTES = 4096
_FOR_EVER = timedelta(days=3650)
"""Ranks wait for rank 0, which may have nothing to do. Where one has died, the engine ends: see ``processes``."""

_PATIENCE = 10.0
"""Seconds within which a process ends whose group has lost a rank."""

Argument = torch.Tensor | int | Sequence[int] | None


class _Tensor(msgspec.Struct):
    """A tensor that is sent apart."""

    dtype: str
    shape: list[int]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * torch.empty(0, dtype=getattr(torch, self.dtype)).element_size()


class _Call(msgspec.Struct):
    """What all ranks are to compute."""

    name: str
    device: str
    """Where its tensors are: "cuda" or "cpu"."""
    arguments: list[_Tensor | int | list[int] | None]


class Ranks:
    """This process's place in the group. Collective methods are called by all ranks in the same order.

    Args:
        rank, size: of this process, and how many there are.
        device_type: "cuda" or "cpu"; on CUDA, rank r has the device of number r.
        port: of this machine, where the ranks find each other.
        listener: at rank 0, the descriptor of a socket that listens there; it is taken over.
    """

    def __init__(self, rank: int, size: int, device_type: str, port: int, listener: int | None = None) -> None:
        self.rank, self.size = rank, size
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # nobody outside this machine can reach them
            os.environ.setdefault(variable, "lo")
        if device_type == "cuda":
            torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        is_host = listener is not None
        store = TCPStore(LOOPBACK, port, size, is_host, wait_for_workers=False, master_listen_fd=listener)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_FOR_EVER)
        atexit.register(dist.destroy_process_group)  # its threads cannot outlive the interpreter

    def share(self, count: int) -> slice:
        """This rank's part of ``count`` rows: all parts are of one size, but for the last ones, which may lack some."""
        each = -(-count // self.size)
        return slice(min(self.rank * each, count), min((self.rank + 1) * each, count))

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' parts, which have one shape. Collective.

        It is taken in the order of the ranks: what an all-reduce gives for a row depends on the row's place among the
        others, and so a sequence's text would depend on its neighbours in the batch.
        """
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous())
        return reduce(torch.add, parts)

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """At rank 0 all ranks' parts [N, columns] side by side, [N, size * columns]; elsewhere the own. Collective."""
        parts = [torch.empty_like(part) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(part.contiguous(), parts)
        return part if parts is None else torch.cat(parts, dim=1)

    def send(self, name: str, *arguments: Argument) -> None:
        """At rank 0: tell the others what is computed next, and with what. All tensors are on one device."""
        tensors = [one for one in arguments if isinstance(one, torch.Tensor)]
        device = tensors[0].device.type if tensors else "cpu"
        header = msgspec.json.encode(_Call(name, device, [_described(one) for one in arguments]))
        dist.broadcast(torch.frombuffer(bytearray(header.ljust(_HEADER_BYTES)), dtype=torch.uint8), 0)
        if tensors:
            dist.broadcast(torch.cat([one.reshape(-1).view(torch.uint8) for one in tensors if one.numel()]), 0)

    def receive(self) -> tuple[str, list[Argument]]:
        """At the other ranks: wait until rank 0 sends something. Tensors are where rank 0 has them."""
        header = torch.empty(_HEADER_BYTES, dtype=torch.uint8)
        dist.broadcast(header, 0)
        call = msgspec.json.decode(header.numpy().tobytes(), type=_Call)
        sizes = [one.num_bytes for one in call.arguments if isinstance(one, _Tensor)]
        if not sizes:
            return call.name, [one for one in call.arguments if not isinstance(one, _Tensor)]
        data = torch.empty(sum(sizes), dtype=torch.uint8, device=call.device)
        dist.broadcast(data, 0)
        parts = iter(torch.split(data, sizes))
        return call.name, [_tensor(next(parts), one) if isinstance(one, _Tensor) else one for one in call.arguments]


@contextlib.contextmanager
def ends_with_the_group() -> Iterator[None]:
    """Around collectives: they fail where a rank has died. What is to be said about that, the engine says."""
    try:
        yield
    except RuntimeError:
        time.sleep(_PATIENCE)
        raise


def _described(argument: Argument) -> _Tensor | int | list[int] | None:
    if isinstance(argument, torch.Tensor):
        return _Tensor(str(argument.dtype).removeprefix("torch."), list(argument.shape))
    return argument if argument is None or isinstance(argument, int) else list(argument)


def _tensor(data: torch.Tensor, described: _Tensor) -> torch.Tensor:
    """From its bytes; copied, as a tensor of wide elements cannot begin at any byte."""
    return data.clone().view(getattr(torch, described.dtype)).view(described.shape)
