"""Keeps bad versions from being published, and takes back those that are bad all the same."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import torch

from evospec.adapters.alignment.scoring import Score
from evospec.engine.adapters_config import GuardConfig
from evospec.engine.online.verify_record import VerifyRecord

_OFFLINE_SIGMAS = 2.0
_MIN_REQUESTS = 4
_CHECK_EVERY = 32
_MIN_COMPARED = 32
_SPAN = 16
"""Times ``watched_records``, over which version and base draft are compared: of so few controls, there must be four."""


class Verdict(Enum):
    """What becomes of a version that was scored."""

    PUBLISH = "publish"
    TRAIN_ON = "train on"  # not worse, but not surely better either: keep it, and ask again later
    REFUSE = "refuse"  # worse: back to the version in force


def judge(candidate: Score, current: Score, base: Score, config: GuardConfig) -> tuple[Verdict, str]:
    """Compare versions on the same held-out positions; the verdict and its reason.

    It is refused if its loss is above that of the version in force by two standard errors of the difference, or its
    agreement below that of the version in force or of the base by more than the margin and two standard errors. It is
    published if its agreement pays, and is above that of the base by two standard errors: a smaller loss alone can come
    from a distribution that is only flatter, such as noise teaches. Above the version in force it need only be by
    ``min_gain``, with a smaller loss: steps from one good version to the next are too small to be sure of, and what an
    operator fears is to be worse off than without.
    """
    more_loss, error = _difference(candidate.losses, current.losses, candidate.requests)
    if not more_loss <= _OFFLINE_SIGMAS * error:  # NaN too
        return Verdict.REFUSE, f"held-out loss {candidate.loss:.4f} is surely above {current.loss:.4f}"
    of_current, of_base = (
        _difference(candidate.accepted, other.accepted, candidate.requests) for other in (current, base)
    )
    for name, other, (gain, error) in (("current", current, of_current), ("base", base, of_base)):
        if gain < -config.agreement_margin - _OFFLINE_SIGMAS * error:
            return Verdict.REFUSE, f"held-out agreement {candidate.agreement:.3f}, {name} {other.agreement:.3f}"
    if not candidate.loss < current.loss:
        return Verdict.TRAIN_ON, f"held-out loss {candidate.loss:.4f} is not below {current.loss:.4f}"
    if candidate.agreement < config.min_agreement:
        return Verdict.TRAIN_ON, f"held-out agreement {candidate.agreement:.3f} does not pay yet"
    gain, error = of_base
    reason = f"{gain:.3f} ± {error:.3f} on the base's {base.agreement:.3f}, {of_current[0]:.3f} on the current"
    if gain <= _OFFLINE_SIGMAS * error or of_current[0] <= config.min_gain:
        return Verdict.TRAIN_ON, f"held-out agreement gained only {reason}"
    return Verdict.PUBLISH, f"held-out agreement gained {reason}"


def _difference(ours: torch.Tensor, theirs: torch.Tensor, requests: torch.Tensor) -> tuple[float, float]:
    """Mean and standard error of what chains [chains] have more, given whose each is.

    The error is that over requests (clusters): neighbouring chains share tokens and differ alike, so taken for
    independent they would look surer than they are. It is infinite where there are very few requests.
    """
    more = ours - theirs
    mean = more.mean()
    count = int(requests.max()) + 1
    if count < _MIN_REQUESTS:
        return float(mean), math.inf
    of_request = torch.zeros(count).index_add_(0, requests, more - mean)
    error = math.sqrt(count / (count - 1) * float(of_request.square().sum())) / len(more)
    return float(mean), error


@dataclass(frozen=True)
class FirstTokenAcceptance:
    """How often the first draft token of a step was right."""

    requests: tuple[tuple[int, int], ...] = ()  # for each request, how often, and in how many steps

    @cached_property
    def num_steps(self) -> int:
        return sum(steps for _, steps in self.requests)

    @cached_property
    def rate(self) -> float | None:
        """Share of the steps in which it was right; None without steps."""
        return sum(accepted for accepted, _ in self.requests) / self.num_steps if self.num_steps else None

    @property
    def is_comparable(self) -> bool:
        """Whether enough steps of enough requests are known to compare rates."""
        return self.num_steps >= _MIN_COMPARED and len(self.requests) >= _MIN_REQUESTS

    def is_below(self, other: FirstTokenAcceptance, margin: float, sigmas: float) -> bool:
        """Whether this rate is below the other's minus ``margin`` by so many standard errors of the difference."""
        if not (self.is_comparable and other.is_comparable) or self.rate is None or other.rate is None:
            return False
        return other.rate - margin - self.rate > sigmas * math.sqrt(self._variance + other._variance)

    def is_surely_below(self, least: float, sigmas: float) -> bool:
        """Whether this rate is below ``least`` by so many standard errors."""
        return self.is_comparable and (self.rate or 0.0) + sigmas * math.sqrt(self._variance) < least

    @property
    def _variance(self) -> float:
        """The rate's variance over requests (clusters), since some text is easier; at least that over single steps."""
        count, steps, rate = len(self.requests), self.num_steps, self.rate or 0.0
        # Two more of each outcome: no variance of zero where all or none were accepted.
        of_steps = (rate * steps + 2) * ((1 - rate) * steps + 2) / (steps + 4) ** 3
        of_requests = sum((accepted - rate * each) ** 2 for accepted, each in self.requests) / steps**2
        return max(of_steps, count / (count - 1) * of_requests)


class _LastSteps:
    """The last so many steps: whether the base draft drafted, for which request, and if the first token was right."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._steps: deque[tuple[bool, str, bool]] = deque()
        self._counts: dict[bool, dict[str, tuple[int, int]]] = {True: {}, False: {}}
        """By drafter and request: how many were right, of how many."""

    def add(self, is_base: bool, request_id: str, is_right: bool) -> None:
        self._steps.append((is_base, request_id, is_right))
        self._count(is_base, request_id, is_right, 1)
        if len(self._steps) > self._size:
            self._count(*self._steps.popleft(), -1)

    def acceptance(self, is_base: bool) -> FirstTokenAcceptance:
        return FirstTokenAcceptance(tuple(self._counts[is_base].values()))

    def _count(self, is_base: bool, request_id: str, is_right: bool, change: int) -> None:
        counts = self._counts[is_base]
        right, steps = counts.get(request_id, (0, 0))
        counts[request_id] = right + change * is_right, steps + change
        if steps + change == 0:
            del counts[request_id]


class Guard:
    """Watches the version of one key that is in force.

    It counts the records of the unbiased sample only, those logged whatever happened in them: among hard examples
    (``is_hard_example``) rejections are over-represented. It looks at whether the draft's first token was right,
    verified or not: how many are drafted and verified depends on how sure the draft is. The version is bad if it is
    below

    - the base draft by more than ``control_margin``, both in the same stretch of traffic: the engine drafts a small
      share of requests without adapter; or
    - the version before it, in the records before it came, by more than ``history_margin``: traffic may have changed,
      so only a great loss counts, but it is seen at once; or
    - ``min_acceptance``, where there is no base draft.

    Each by ``sigmas`` standard errors, of four requests on either side or more, looked at every 32 records.
    tests/unit/test_guard.py has the false alarms.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self.previous = FirstTokenAcceptance()
        """Acceptance of the version before, or of the last before it that was met often enough to be compared with."""
        self._start(0)

    @property
    def in_force(self) -> FirstTokenAcceptance:
        """Recent acceptance of what is in force: a version or the base draft."""
        return self._recent.acceptance(is_base=self.version == 0)

    @property
    def acceptance(self) -> FirstTokenAcceptance:
        """Acceptance of the version in force, since it came."""
        return self._both.acceptance(is_base=False)

    @property
    def control(self) -> FirstTokenAcceptance:
        """Acceptance of the base draft since the version came."""
        return self._both.acceptance(is_base=True)

    @property
    def is_good(self) -> bool:
        """Whether the version was watched long enough to be one to return to."""
        return self.version == 0 or self.num_watched >= self._config.watched_records

    @property
    def may_be_followed(self) -> bool:
        """Whether enough is known of the version in force for another one, or nobody has met it."""
        return self.version == 0 or self.num_watched == 0 or self.num_watched >= self._config.min_watched

    def rates(self) -> dict[str, float | None]:
        """What it compares, for the log."""
        each = {"acceptance": self.acceptance, "control": self.control, "recent": self.in_force}
        return {name: one.rate for name, one in (each | {"previous": self.previous}).items()}

    def watch(self, version: int) -> None:
        """``version`` of the channel is in force from now on; 0: the base draft."""
        if self.in_force.is_comparable:  # else too little is known of it: the one before it says more
            self.previous = self.in_force
        self._start(version)

    def is_bad_after(self, record: VerifyRecord) -> bool:
        """Count a record; whether the version in force is bad, and should be taken back."""
        drafted_by, is_right = record.draft_version, _is_first_right(record)
        if record.is_hard_example or is_right is None:
            return False
        if drafted_by not in (0, self.version):  # it was on its way while this one came
            return False
        is_base = drafted_by == 0
        self._both.add(is_base, record.request_id, is_right)
        if drafted_by == self.version:
            self._recent.add(is_base, record.request_id, is_right)
        if is_base:
            return False
        self.num_watched += 1
        return self.num_watched % _CHECK_EVERY == 0 and self._is_bad()

    def _start(self, version: int) -> None:
        self.version = version  # the channel's version in force; to be set where the same weights were published again
        self.num_watched = 0  # records that count of the version in force
        self._recent = _LastSteps(self._config.watched_records)  # steps of what is in force
        self._both = _LastSteps(_SPAN * self._config.watched_records)
        """Steps of version and base draft, since the version came."""

    def _is_bad(self) -> bool:
        config = self._config
        if self.in_force.is_surely_below(config.min_acceptance, config.sigmas):
            return True
        return self.acceptance.is_below(self.control, config.control_margin, config.sigmas) or self.in_force.is_below(
            self.previous, config.history_margin, config.sigmas
        )


def _is_first_right(record: VerifyRecord) -> bool | None:
    """Whether the first draft token was right; where an older engine does not say so, if it was verified."""
    is_known = record.first_right is not None or record.copied or not record.drafted
    return record.first_right if is_known else record.num_accepted > 0
