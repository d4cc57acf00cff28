"""The engine's end of full-parameter online distillation: versions of the whole draft, in place of its own weights.

``python -m benchmarks.distillation.whole_draft`` is ``python -m evospec.engine.process`` with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from evospec.engine import process
from evospec.engine.adapters_config import AdaptersConfig
from evospec.engine.models.config import ModelError
from evospec.engine.models.eagle3 import Eagle3
from evospec.engine.online.adapters import BASE, Assignment
from evospec.engine.online.whole_draft import WholeDraft
from evospec.engine.request import Request
from evospec.engine.speculation import build


class DistilledDraft(WholeDraft):
    """All weights of a draft, which change for everybody at once. The base's are kept to return to.

    Raises:
        ModelError: as ``EagleAdapters``, or not everybody would draft with the slot.
    """

    records_output = False

    def __init__(self, config: AdaptersConfig, draft: Eagle3, base: str) -> None:
        if config.key_scope != "global" or config.log.control_share:
            raise ModelError(
                "alignment: the draft of all requests changes at once: that needs key_scope global, and "
                "log.control_share 0, since no request can keep the base draft"
            )
        self._base = {name: weight.detach().clone() for name, weight in draft.named_parameters()}
        super().__init__(config, draft, base)
        self.num_bytes += sum(weight.nbytes for weight in self._base.values())

    def find_draft(self, requests: Sequence[Request]) -> list[bool]:
        """The base's, if nothing was published."""
        super().find_draft(requests)
        return [True] * len(requests)

    def _put_in_force(self, index: int, assignment: Assignment) -> None:
        if assignment == BASE and self._in_force[index] != BASE:
            self.network.load(self._base)
        super()._put_in_force(index, assignment)


def main() -> None:
    """Serve as ``engine.process`` does."""
    build.EagleAdapters = DistilledDraft  # type: ignore[attr-defined]
    process.main()


if __name__ == "__main__":
    main()
