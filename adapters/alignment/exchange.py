"""What the servers of one key tell each other: who learns it, which version is in force, and what operators command."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from evospec.adapters.alignment.aligner import KeyAligner
from evospec.adapters.alignment.shared_versions import SharedVersions
from evospec.engine.online.adapter_control import AdapterCommand

log = structlog.get_logger(__name__)


def obey(aligner: KeyAligner, command: AdapterCommand, now: float) -> None:
    """Do what an operator asks, so that other servers do it, too; the owner saves it. ``now``: by the log's clock.

    A reset, and what ends a freeze, moves ``state.learns_after``: what was logged before is not to be learned from.
    """
    log.info("adapter command", key=command.key, action=command.action)
    if command.action == "rollback":
        aligner.roll_back()
        aligner.unshared.add("version")
    elif command.action == "reset":
        aligner.forget(now)
        aligner.unshared.add("reset")
    else:
        aligner.state.is_frozen = command.action == "freeze"
        aligner.state.learns_after = now
        aligner.unshared.add("frozen")
    aligner.is_unsaved = True


def exchange(aligner: KeyAligner, shared: SharedVersions, clock: Callable[[], float]) -> None:
    """Give other servers what was learned or commanded here, and take what others have.

    What others have forgotten is forgotten first, or this server would give it back to them. A version that the disk
    has no room for, which is an error, is looked at again.

    Args:
        aligner: of the key.
        shared: what is common to the servers.
        clock: when what is verified now will be logged, by the clock of Redis.
    """
    state = aligner.state
    aligner.leads = (aligner.wants_work or aligner.wants_answers) and shared.leads(state.key)
    found = shared.look(state.key)
    if found is None:
        return
    if found.num_resets not in (0, state.num_resets) and "reset" not in aligner.unshared:  # 0: Redis may have lost it
        aligner.forget(clock())
        aligner.state.num_resets = found.num_resets
        aligner.save()
    if aligner.unshared:
        _tell(aligner, shared)
        return
    if found.is_frozen is not None and found.is_frozen != aligner.state.is_frozen:
        aligner.state.is_frozen, aligner.state.learns_after = found.is_frozen, clock()
        aligner.save()
    if found.number not in (0, aligner.shared_number):
        _follow(aligner, shared)


def _tell(aligner: KeyAligner, shared: SharedVersions) -> None:
    state, unshared = aligner.state, aligner.unshared
    if "reset" in unshared and (num_resets := shared.reset(state.key)) is not None:
        state.num_resets = num_resets
        unshared.remove("reset")
    if "frozen" in unshared and shared.freeze(state.key, state.is_frozen):
        unshared.remove("frozen")
    if "version" in unshared and (number := shared.publish(state.key, aligner.tensors)) is not None:
        aligner.shared_number = state.own_number = number
        unshared.remove("version")
    aligner.save()


def _follow(aligner: KeyAligner, shared: SharedVersions) -> None:
    state, found = aligner.state, shared.version(aligner.state.key)
    if found is None:
        return
    if found.number == state.bad_number == state.own_number:  # a worker was killed before it could tell
        aligner.unshared.add("version")
    elif found.fits and found.number != state.bad_number:
        aligner.follow(found.tensors, is_own=found.number == state.own_number)
        aligner.is_unsaved = True
    aligner.shared_number = found.number
