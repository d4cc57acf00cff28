"""What the token log says about one verify step of one sequence. The format is described in docs/token-log.md."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

FORMAT = 1
"""Changes when an old reader would misread a new record. A field added at the end, with a default, does not."""

_MAX_NUMBER = 2**62
"""Positions and places in the ring are no greater: they must fit into 64-bit tensors."""
_STEPS_AT_ONCE = 32
"""To write one step takes about as long as to write so many."""
_MOST_SECONDS = 0.5


class RecordError(Exception):
    """These bytes are no record of this format."""


class VerifyRecord(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One verify step: what was drafted, what the target chose, and its distribution there.

    ``position`` is that of the first drafted token, ``last_token`` the one before it. The first ``num_accepted`` of
    ``drafted`` were right and ``next_token`` follows them: the bonus token if all were right, else the recovered one.
    ``top_ids`` (int32) and ``top_logits`` (float16) are arrays [steps, k], little endian, most likely first: row i is
    the target's raw logits for position + i. Make them with ``pack_top_k``, read them with ``top_k_arrays``.
    ``is_hard_example``: kept because it teaches (a rejection, or a KL over the threshold); other records belong to the
    unbiased sample, which is kept whatever happens.
    ``num_features`` rows of the feature ring, from ``feature_slot`` on and all of ``feature_generation``, are features:
    row i is what the draft takes together with the token at position - 1 + i. ``context``, in a request's first
    record and in one after some seconds of silence, is int32 token ids, little endian: those before ``last_token``, to
    which the draft attends. Their features are the rows right before ``feature_slot``.
    """

    format: int = FORMAT
    request_id: str
    tenant: str
    adapter_key: str | None
    domain: str | None
    position: int
    last_token: int
    drafted: tuple[int, ...]
    num_accepted: int
    next_token: int
    draft_version: int
    top_k: int
    top_ids: bytes
    top_logits: bytes
    is_hard_example: bool
    feature_slot: int
    feature_generation: int
    num_features: int
    context: bytes = b""
    copied: bool = False
    """Whether ``drafted`` was copied from the text, so that it says nothing of the draft."""
    first_right: bool | None = None
    """Whether the draft's first token was the target's choice, verified or not; None: not asked, or not told."""
    prior: bytes = b""
    """float16, little endian: the prior's weights, of ``kernels.session_options.FEATURES``, with which was drafted."""
    is_synthetic: bool = False
    """Whether the worker itself had asked for the answer, so that it says nothing of traffic."""

    @property
    def num_context(self) -> int:
        """Number of tokens in ``context``."""
        return len(self.context) // 4

    def context_ids(self) -> npt.NDArray[np.int32]:
        """The token ids [num_context] in ``context``."""
        return np.frombuffer(self.context, dtype="<i4")

    def prior_weights(self) -> npt.NDArray[np.float16]:
        """The weight of each feature; none: without a prior."""
        return np.frombuffer(self.prior, dtype="<f2")

    def top_k_arrays(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float16]]:
        """Token ids [steps, k] and their logits [steps, k]."""
        ids = np.frombuffer(self.top_ids, dtype="<i4").reshape(-1, self.top_k)
        return ids, np.frombuffer(self.top_logits, dtype="<f2").reshape(-1, self.top_k)

    def teaches(self, kl_threshold: float) -> bool:
        """Whether a draft was refused or none was made, or the target thought little of one that was accepted.

        That is where the KL divergence of the target from a draft sure of its token, in nats, is over the threshold.
        """
        if self.num_accepted < len(self.drafted) or not self.drafted:
            return True
        ids, logits = self.top_k_arrays()
        known = logits[: len(self.drafted)].astype(np.float64)
        is_drafted = ids[: len(known)] == np.array(self.drafted[: len(known)])[:, None]
        surprisals = np.logaddexp.reduce(known, axis=1) - np.where(is_drafted, known, -np.inf).max(axis=1)
        return not (surprisals <= kl_threshold).all()  # NaN teaches, too


@dataclass(slots=True)
class UnwrittenSteps:
    """Steps of a request, one right after the other, that wait to be written."""

    began_at: float
    """When (``time.monotonic``) the first of them was made."""
    block_ids: array[int] = field(default_factory=lambda: array("i"))
    """The request's blocks at the last of them: they hold what is stored of its tokens."""
    records: list[VerifyRecord] = field(default_factory=list)
    """One of each step, without context and prior, and without a place in the feature ring."""

    @property
    def start(self) -> int:
        """Position of their first token."""
        return self.records[0].position - 1

    @property
    def token_ids(self) -> list[int]:
        """Of each step the last known token and the accepted drafts."""
        return [token for one in self.records for token in (one.last_token, *one.drafted[: one.num_accepted])]

    def add(self, record: VerifyRecord, block_ids: array[int]) -> None:
        """Another step, and the request's blocks then, which are copied."""
        self.records.append(record)
        self.block_ids = block_ids[:]

    def are_enough(self, now: float, max_tokens: int) -> bool:
        """Whether they are to be written now: they are many, have as many tokens as that, or wait for long."""
        are_many = len(self.records) >= _STEPS_AT_ONCE or self.next_position - self.start > max_tokens
        return are_many or now - self.began_at >= _MOST_SECONDS

    @property
    def next_position(self) -> int:
        """Where a step would be that comes right after them."""
        last = self.records[-1]
        return last.position + last.num_accepted + 1


def pack_top_k(ids: npt.NDArray[np.integer], logits: npt.NDArray[np.floating]) -> tuple[bytes, bytes]:
    """The fields ``top_ids`` and ``top_logits`` for arrays [steps, k]."""
    return ids.astype("<i4", copy=False).tobytes(), logits.astype("<f2", copy=False).tobytes()


def pack_ids(ids: Sequence[int]) -> bytes:
    """The field ``context`` for token ids."""
    return np.array(ids, dtype="<i4").tobytes()


def pack_weights(weights: npt.NDArray[np.floating]) -> bytes:
    """The field ``prior`` for weights."""
    return weights.astype("<f2", copy=False).tobytes()


def encode_record(record: VerifyRecord) -> bytes:
    """The record as MessagePack, an array of the fields in their order."""
    return msgspec.msgpack.encode(record)


def decode_record(data: bytes) -> VerifyRecord:
    """The record that ``encode_record`` was given; raises ``RecordError``."""
    try:
        record = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RecordError(str(error)) from error
    steps, rest = divmod(len(record.top_ids), 4 * record.top_k) if record.top_k > 0 else (0, 1)
    if record.format != FORMAT or rest or len(record.top_logits) != 2 * record.top_k * steps:
        raise RecordError(f"format {record.format}, {len(record.top_ids)} bytes of ids for k = {record.top_k}")
    if max(abs(record.position), abs(record.feature_slot), abs(record.feature_generation)) > _MAX_NUMBER:
        raise RecordError("a position or a place in the ring that there cannot be")
    if len(record.context) % 4 or len(record.prior) % 2:
        raise RecordError(f"{len(record.context)} bytes of context, {len(record.prior)} of a prior's weights")
    return record


_decoder = msgspec.msgpack.Decoder(VerifyRecord)
