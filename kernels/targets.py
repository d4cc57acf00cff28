"""The processors that the CPU kernels are compiled for, and which of them this one is."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"


@dataclass(frozen=True)
class Target:
    """One library.

    Attributes:
        name: of the library.
        features: what the compiler may use, as compilers name it.
        required: what the CPU must have, as Linux names it.
        sources: what it is made of, below ``SOURCES``.
    """

    name: str
    features: tuple[str, ...]
    required: tuple[str, ...]
    sources: str = "**/*.cpp"

    @property
    def library(self) -> Path:
        return Path(__file__).parent / f"_native_{self.name}.so"

    @property
    def is_of_these_sources(self) -> bool:
        """Whether the library is there, and says that it was made of the sources that are."""
        return self.library.exists() and sources_hash().encode() in self.library.read_bytes()

    @functools.cached_property
    def missing(self) -> list[str]:
        """What this machine's CPU lacks."""
        flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
        return [feature for feature in self.required if feature not in flags]


_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi")
TARGETS = (
    # AMX is used only where it is found (csrc/tiles.cpp).
    Target(
        "avx512",
        (*_AVX512, "avx512bf16", "avx512vnni", "amx-tile", "amx-bf16", "amx-int8", "f16c", "fma"),
        (*_AVX512, "avx512_bf16", "avx512_vnni", "f16c", "fma"),
    ),
    Target("avx2", ("avx2", "f16c", "fma"), ("avx2", "f16c", "fma")),
)
"""The best first."""
PLAIN = Target("plain", (), (), "sessions/*.cpp")
"""What every machine runs: sessions' bookkeeping, which is in all the other libraries too."""


def best_target() -> Target | None:
    """The best that this machine runs; None where it runs none."""
    return next((target for target in TARGETS if not target.missing), None)


@functools.cache
def sources_hash() -> str:
    """Of the kernels' sources, as a library of them names it."""
    digest = hashlib.sha256()
    for path in sorted(path for path in SOURCES.rglob("*") if path.suffix in (".cpp", ".h")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def load_of_these_sources(target: Target) -> ctypes.CDLL | None:
    """A target's library; None where there is none that was made of the sources that are here."""
    if target.missing or not target.is_of_these_sources:
        return None
    try:
        return ctypes.CDLL(str(target.library))
    except OSError:
        return None
