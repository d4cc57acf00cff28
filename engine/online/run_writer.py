"""Writes steps down for the adapters worker, several of a request at a time: features and records."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import msgspec
import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from evospec.engine.adapters_config import AdaptersConfig
from evospec.engine.models.config import ModelError
from evospec.engine.online.feature_ring import FeatureRing
from evospec.engine.online.shared_file import SharedMemoryError, make_private_directory
from evospec.engine.online.token_log import TokenLog
from evospec.engine.online.verify_record import UnwrittenSteps, pack_ids, pack_weights
from evospec.engine.request import Request
from evospec.engine.speculation.drafters.kv import Chunk

log = structlog.get_logger(__name__)

_LOOK_SECONDS = 1.0
_CONTEXT_SECONDS = 3.0
"""After so long without a record a request's context comes again: the worker gives a silent request up after five."""


class RunWriter:
    """The engine's end of feature ring and token log. It never waits: what cannot be taken is dropped and counted.

    A request's first record, and the first after a while, brings along the tokens before it: its prompt, to which the
    draft attends.

    Args:
        config: alignment is on.
        width: of a feature.
        features: [T, width] of the positions before the tokens of some chunks.
        prior_weights: [n, NUM_FEATURES] of the priors with which some requests are drafted for; None: without priors.

    Raises:
        ModelError: the ring cannot be made.
    """

    def __init__(
        self,
        config: AdaptersConfig,
        width: int,
        features: Callable[[Sequence[Chunk]], torch.Tensor],
        prior_weights: Callable[[Sequence[Request]], NDArray[np.float32] | None],
    ) -> None:
        assert config.redis_url is not None, "alignment is on"
        self._config, self._features, self._prior_weights = config, features, prior_weights
        self._make_ring = partial(FeatureRing, config.ring_path, config.log.ring_rows, width)
        try:
            self._ring = self._make_ring()
        except SharedMemoryError as error:
            raise ModelError(f"alignment: no feature ring: {error}") from error
        self._log = TokenLog(
            config.redis_url,
            config.log.stream,
            max_records=config.log.max_records,
            interval=config.log.interval_seconds,
        )
        self.stats = self._log.stats
        """What has become of the records."""
        self.max_block = config.log.ring_rows // 4
        """Rows that runs have at most to be written together, a context has at most, and steps are written at: with a
        last step of ``MAX_COPIED_TOKENS`` more, a run fits into the smallest ring."""
        self._max_context = min(config.log.context_tokens, self.max_block)
        self._logged_at: dict[Request, float] = {}
        """When (``time.monotonic``) each request was logged last, with its context or after it."""
        self._look_at, self._num_lost, self._lost_at = 0.0, 0, -math.inf
        """When to look around, how many records were lost so far, and when the last ones were."""

    @torch.inference_mode()
    def write(self, runs: Sequence[tuple[Request, UnwrittenSteps]]) -> None:
        """Write steps of some requests, whose blocks still hold what was stored of them."""
        self._look_around()
        chunks = [self._with_context(request, steps) for request, steps in runs]
        try:
            places = self._store(self._features(chunks).cpu(), [len(chunk.token_ids) for chunk in chunks])
        except SharedMemoryError:  # somebody truncated the ring, and memory is full: the next look around makes another
            self.stats.num_dropped_by_queue += sum(len(steps.records) for _, steps in runs)
            return
        priors = self._priors([request for request, _ in runs])
        for (_, steps), chunk, (slot, generation), prior in zip(runs, chunks, places, priors, strict=True):
            num_before = steps.start - chunk.start
            context = pack_ids(chunk.token_ids[:num_before])
            for record in steps.records:
                whole = msgspec.structs.replace(
                    record,
                    feature_slot=slot + num_before,
                    feature_generation=generation,
                    context=context,
                    prior=prior,
                )
                self._log.log(whole)
                num_before, context = num_before + record.num_features, b""

    def forget(self, request: Request) -> None:
        """A request has ended."""
        self._logged_at.pop(request, None)

    def _with_context(self, request: Request, steps: UnwrittenSteps) -> Chunk:
        """The steps' own tokens; the first time, and after a while without any, also those before."""
        start, now = steps.start, time.monotonic()
        logged_at = self._logged_at.get(request, -math.inf)
        self._logged_at[request] = now
        if now - logged_at >= _CONTEXT_SECONDS or logged_at <= self._lost_at:
            start = max(0, start - self._max_context)
        before = request.all_token_ids[start : steps.start]
        return Chunk(start, before + steps.token_ids, 0, steps.block_ids, request)

    def _store(self, rows: torch.Tensor, lengths: Sequence[int]) -> list[tuple[int, int]]:
        """Write rows [T, width] to the ring: slot of the first of each chunk of such a length, and its generation."""
        if len(rows) > self.max_block:
            return [self._ring.write(part) for part in rows.split_with_sizes(list(lengths))]
        slot, generation = self._ring.write(rows)
        return [(slot + first, generation) for first in accumulate(lengths[:-1], initial=0)]

    def _priors(self, requests: Sequence[Request]) -> list[bytes]:
        """The packed weights with which each is drafted for."""
        weights = self._prior_weights(requests)
        if weights is None:
            return [b""] * len(requests)
        return [pack_weights(row) if row.any() else b"" for row in weights]

    def _look_around(self) -> None:
        """See once a second whether records were lost, and that a worker finds the ring; if not, make another."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_SECONDS
        if self._num_lost != (lost := self.stats.num_dropped_by_queue + self.stats.num_dropped_by_redis):
            self._num_lost, self._lost_at = lost, now  # contexts may be among them
        if not self._ring.is_lost():
            return
        try:
            make_private_directory(self._config.shared_directory)
            self._ring = self._make_ring()
        except SharedMemoryError as error:
            log.warning("no other feature ring", reason=str(error))
        else:
            log.warning("lost feature ring replaced")
