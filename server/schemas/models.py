"""/v1/models."""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.models.sampling_defaults import SamplingDefaults


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """The served model. ``max_model_len`` bounds prompt plus output, in tokens.

    ``root``: what it was before ``--served-model-name``, such as its Hugging Face id. ``default_sampling_params``: for
    what a request leaves out. ``type``, ``display_name`` and ``created_at`` are Anthropic's.
    """

    id: str
    object: Literal["model"] = "model"
    type: Literal["model"] = "model"
    display_name: str
    created: int
    created_at: str
    owned_by: str = "evospec"
    root: str
    max_model_len: int
    default_sampling_params: SamplingDefaults


class Version(msgspec.Struct, frozen=True):
    """/version."""

    version: str


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """All models of this server: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
