"""What torch has of CUDA's driver, for the device of ``tests.emulated_cuda``: streams, graphs, Triton's launches.

``install`` changes torch for the whole process, and must run before ``engine`` is imported: so it is for processes of
its own (``tests.emulated_engine``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tests.emulated_cuda import (
    COUNTS,
    Moment,
    Tape,
    compute_all,
    dispatch,
    held,
    is_readable,
    launch,
    line,
    register,
    tapes,
    unregister,
    wait,
    wait_once,
)


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class _Stream:
    def wait_stream(self, other: object) -> None:
        """Nothing: everything happens in order."""

    def synchronize(self) -> None:
        wait("synchronize")


class _Event:
    """``torch.cuda.Event``."""

    def __init__(self) -> None:
        self._moment: Moment | None = None

    def record(self) -> None:
        self._moment = Moment()

    def synchronize(self) -> None:
        if self._moment is not None and not self._moment.is_past:
            wait("synchronize")


class _Graph:
    """``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.tape = Tape()

    def replay(self) -> None:
        COUNTS.replays += 1
        self.tape.check()
        compute_all(self.tape.work)


@contextlib.contextmanager
def _capture(graph: _Graph, **options: object) -> Iterator[None]:
    """``torch.cuda.graph``, which waits for all that was launched before."""
    wait_once()
    tapes.append(graph.tape)
    try:
        yield
    finally:
        tapes.pop()


def _run_triton(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """A Triton kernel, in plain torch."""
    from tests.emulated_triton import KERNELS

    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and not is_readable(value):
            raise RuntimeError(f"a tensor on the host for a Triton kernel: {line()}")
    inner_args, inner_kwargs = tree_map(held, (args, kwargs))

    def compute() -> None:
        KERNELS[self.__name__](*inner_args, **inner_kwargs)

    compute_all([compute])
    launch(self.__name__, compute, (*args, *kwargs.values()))


def install(free: int = 60 << 30, total: int = 80 << 30) -> None:
    """From here on there is a GPU with so many bytes."""
    os.environ["TRITON_INTERPRET"] = "1"  # so that Triton asks for no driver
    from triton.runtime.interpreter import InterpretedFunction

    InterpretedFunction.run = _run_triton
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    of_host = torch.tensor
    cuda: Any = torch.cuda
    torch._C._ensureCUDADeviceGuardSet()

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return of_host(data, **kwargs) if device is None else of_host(data, **kwargs).to(device)

    torch.tensor = tensor  # type: ignore[assignment]
    torch.inference_mode = _no_gradients  # type: ignore[misc, assignment]
    cuda._lazy_init, cuda.is_available, cuda.is_initialized = lambda: None, lambda: True, lambda: True
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.get_device_name = lambda device=None: "a GPU that is not there"
    cuda.mem_get_info = lambda device=None: (free, total)
    cuda.current_stream, cuda.Stream, cuda.Event = lambda device=None: _Stream(), _Stream, _Event
    cuda.cudart = lambda: SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    cuda.synchronize = lambda device=None: wait("synchronize")
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.set_sync_debug_mode = lambda mode: None
    cuda.graph_pool_handle, cuda.CUDAGraph, cuda.graph = lambda: (0, 0), _Graph, _capture
    _Mode().__enter__()  # type: ignore[no-untyped-call]


def _no_gradients(mode: Any = True) -> Any:
    """In place of ``torch.inference_mode``, in which wrapped tensors cannot be made."""
    return torch.no_grad()(mode) if callable(mode) else torch.no_grad()
