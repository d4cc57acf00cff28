"""A CUDA device that is not there: tensors that say ``cuda:0``, lie in main memory, and are treated as CUDA's are.

It refuses what CUDA refuses: tensors of two devices in one operation, addresses of device memory on the host, and
within a capture everything that waits. A captured graph computes its operations anew from the memory that they read, so
what the host decided while it was recorded stays as it was; it is not replayed when something that it reads was freed.
It counts what costs time, by the line that caused it: waits of the host for the device, and launches outside of graphs.
It says nothing about a GPU's numbers or its speed.

``tests.emulated_driver.install`` puts it in place.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda:0")
_ROOT = Path(__file__).parents[1]
_SOURCES = tuple(f"{_ROOT / 'evospec' / folder}{os.sep}" for folder in ("engine", "kernels"))
_VIEWS = frozenset(
    ("view", "_unsafe_view", "as_strided", "slice", "select", "expand", "permute", "transpose", "t", "unsqueeze")
) | {
    *("squeeze", "split", "split_with_sizes", "unbind", "detach", "alias", "_reshape_alias", "unfold", "lift_fresh"),
    *("diagonal", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}
"""Operations that launch nothing."""
_DATA_DEPENDENT = frozenset(
    ("nonzero", "masked_select", "_unique2", "unique_dim", "_local_scalar_dense", "equal", "repeat_interleave")
)
"""Operations whose result the host has to wait for."""
_INDEXED = frozenset(("index", "index_put", "index_put_", "_index_put_impl_"))


class Counts:
    """What was done so far, each by source line.

    Attributes:
        waits: of the host for the device: copies to the host, from memory that is not pinned, explicit ones.
        launches: of kernels outside of graphs.
        uploads: copies to the device that nobody waits for.
        replays: of graphs.
    """

    def __init__(self) -> None:
        self.waits, self.launches, self.uploads = Counter[str](), Counter[str](), Counter[str]()
        self.replays = 0

    def reset(self) -> None:
        """Begin anew."""
        self.__init__()  # type: ignore[misc]


COUNTS = Counts()
_num_waits = 0
"""In all, whatever was counted anew."""
_pinned: dict[int, torch.Tensor] = {}
"""Pinned memory by its address, kept so that no address is used twice."""
_registered = set[int]()
"""Addresses of memory of the host that kernels may read."""
_users = Counter[int]()
"""How many tensors there are of each memory of the device, by its address. A graph's own operations do not count."""


class CaptureError(RuntimeError):
    """Something that a stream capture refuses."""


class Tape:
    """What a graph does. It keeps no memory that it reads, as CUDA's graphs do not, but for what it has made itself."""

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []
        self.made = set[int]()
        self._read: dict[int, str] = {}

    def add(self, compute: Callable[[], object], reads: Iterable[Any]) -> None:
        """``reads``: the device tensors of an operation; anything else is left out."""
        self.work.append(compute)
        for tensor in reads:
            if isinstance(tensor, DeviceTensor):
                self._read.setdefault(_address(tensor.held), line())

    def check(self) -> None:
        """Raise if something that the graph reads is no longer there."""
        for address, where in self._read.items():
            if address not in self.made and not _users[address]:
                raise RuntimeError(f"a graph reads memory that was freed since it was recorded: {where}")


tapes: list[Tape] = []
"""The graph that is being recorded, as the last of these; empty: none is."""


def _address(memory: torch.Tensor) -> int:
    return memory.untyped_storage().data_ptr()


class DeviceTensor(torch.Tensor):
    """A tensor on the device; ``held`` is where its numbers are."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> DeviceTensor:
        shape: dict[str, Any] = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), **shape, dtype=held.dtype, device=held.device)
        assert isinstance(made, DeviceTensor)
        made.held, address = held, _address(held)
        if tapes and not _users[address]:
            tapes[-1].made.add(address)
        _users[address] += 1
        weakref.finalize(made, _users.subtract, (address,)).atexit = False
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        wait("to the host")
        return self.held.clone()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def item(self) -> Any:
        return self.cpu().item()

    def numpy(self) -> Any:  # type: ignore[override]
        raise TypeError(f"device memory cannot be an array: {line()}")

    def data_ptr(self) -> int:
        raise RuntimeError(f"address of device memory on the host: {line()}")

    def to(self, *args: Any, **kwargs: Any) -> Any:
        values = [*args, *kwargs.values()]
        dtypes = [value for value in values if isinstance(value, torch.dtype)]
        if any(isinstance(value, (str, torch.device)) and torch.device(value).type == "cpu" for value in values):
            return self.cpu().to(dtypes[0]) if dtypes else self.cpu()
        return super().to(dtypes[0]) if dtypes else self


def line() -> str:
    """Where in the product we are."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_SOURCES):
            return f"{Path(name).relative_to(_ROOT)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


def wait(reason: str) -> None:
    """The host waits for the device."""
    if tapes:
        raise CaptureError(f"{reason}, within a capture: {line()}")
    COUNTS.waits[f"{line()} {reason}"] += 1
    wait_once()


def wait_once() -> None:
    """A wait that no later step has, and that does not count."""
    global _num_waits
    _num_waits += 1


class Moment:
    """A place in the stream, which the device has reached once the host has waited for it since."""

    def __init__(self) -> None:
        self._at = _num_waits

    @property
    def is_past(self) -> bool:
        return _num_waits > self._at


def launch(name: str, compute: Callable[[], object], reads: Iterable[Any]) -> None:
    """Work of the device that was done once already; a graph that is being recorded will do it again."""
    if tapes:
        tapes[-1].add(compute, reads)
    else:
        COUNTS.launches[f"{line()} {name}"] += 1


def compute_all(work: Iterable[Callable[[], object]]) -> None:
    """The device's part of it: there all tensors are plain ones, which need not be looked at."""
    with torch._C._DisableTorchDispatch():
        for compute in work:
            compute()


def held(value: Any) -> Any:
    """The numbers of a device tensor; anything else as it is."""
    return value.held if isinstance(value, DeviceTensor) else value


def register(address: int, num_bytes: int, flags: int) -> int:
    """``cudaHostRegister``, which wants pages of their own."""
    assert address not in _registered
    assert address % os.sysconf("SC_PAGE_SIZE") == 0
    assert num_bytes > 0
    _registered.add(address)
    return 0


def unregister(address: int) -> int:
    """``cudaHostUnregister``."""
    _registered.remove(address)
    return 0


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether kernels can read a tensor."""
    return isinstance(tensor, DeviceTensor) or tensor.untyped_storage().data_ptr() in _registered


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name.partition("::")[2]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if name == "copy_":
        return _copy(func, args, kwargs)
    asked = kwargs.get("device")
    is_on_device = torch.device(asked).type == "cuda" if asked is not None else _are_on_device(tensors)
    if name == "_to_copy" and is_on_device != isinstance(args[0], DeviceTensor):
        return _move(func, args, kwargs)
    inner_args, inner_kwargs = tree_map(held, (args, kwargs))
    if not is_on_device:
        return _on_host(func, inner_args, inner_kwargs)
    inner_kwargs.pop("pin_memory", None)
    if asked is not None:
        inner_kwargs["device"] = torch.device("cpu")
    _check_devices(name, args, tensors)
    if name in _DATA_DEPENDENT:
        wait(name)
    result = func(*inner_args, **inner_kwargs)
    is_in_place = "out" in kwargs or (name.endswith("_") and not name.endswith("__"))
    if name not in _VIEWS:
        launch(name, lambda: _again(result, func(*inner_args, **inner_kwargs)), tensors)
    if is_in_place:
        return kwargs.get("out", args[0])
    return tree_map(lambda value: DeviceTensor(value) if isinstance(value, torch.Tensor) else value, result)


def _are_on_device(tensors: list[torch.Tensor]) -> bool:
    return any(isinstance(tensor, DeviceTensor) for tensor in tensors)


def _again(old: Any, new: Any) -> None:
    """A replay's results take the place of the ones before."""
    for before, after in zip(tree_leaves(old), tree_leaves(new), strict=True):
        if isinstance(before, torch.Tensor) and before.data_ptr() != after.data_ptr():
            before.copy_(after)


def _on_host(func: Any, args: Any, kwargs: Any) -> Any:
    is_pinned = bool(kwargs.pop("pin_memory", None))
    result = func(*args, **kwargs)
    if is_pinned:
        _pinned[result.untyped_storage().data_ptr()] = result
    return result


def _is_pinned(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() in _pinned


def _copy(func: Any, args: Any, kwargs: Any) -> Any:
    to, source = args[0], args[1]
    no_wait = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    func(held(to), held(source), *args[2:], **kwargs)
    if isinstance(to, DeviceTensor) and isinstance(source, DeviceTensor):
        launch("copy_", lambda: func(to.held, source.held), (to, source))
    elif isinstance(to, DeviceTensor):
        _upload(source, no_wait)
    elif isinstance(source, DeviceTensor) and not (no_wait and _is_pinned(to)):
        wait("copy to the host")
    return to


def _move(func: Any, args: Any, kwargs: Any) -> Any:
    """``_to_copy`` between the devices."""
    source, no_wait = args[0], kwargs.pop("non_blocking", False)
    moved = func(held(source), **(kwargs | {"device": torch.device("cpu")})).clone()
    if isinstance(source, DeviceTensor):
        wait("copy to the host")
        return moved
    _upload(source, no_wait)
    return DeviceTensor(moved)


def _upload(source: torch.Tensor, no_wait: bool) -> None:
    if tapes:
        raise CaptureError(f"copy from the host, within a capture: {line()}")
    if no_wait and _is_pinned(source):
        COUNTS.uploads[line()] += 1
    else:
        wait("copy from the host")


def _check_devices(name: str, args: Any, tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        if isinstance(tensor, DeviceTensor) or tensor.dim() == 0:
            continue
        if name not in _INDEXED or tensor is args[0]:
            raise RuntimeError(f"{name}: tensors of two devices: {line()}")
        wait("index on the host")
    if name in _INDEXED:
        masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        if any(isinstance(mask, DeviceTensor) for mask in masks):
            wait("mask as an index")
