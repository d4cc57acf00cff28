"""xgrammar without transformers, of which it names three classes when it is imported, and needs none here.

They are for a tokenizer of transformers', or for its ``generate``. To import them takes most of a second and 24 MB, in
the engine and in the process that forks for grammars.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_WHERE = "transformers"


def import_xgrammar(
    named: Sequence[str] = ("LogitsProcessor", "PreTrainedTokenizerBase", "PreTrainedTokenizerFast"),
) -> Any:
    """The package, by empty classes of these names in place of transformers, or by that where they do not do."""
    if _WHERE not in sys.modules:
        stand_in = ModuleType(_WHERE)
        vars(stand_in).update({name: type(name, (), {}) for name in named})
        sys.modules[_WHERE] = stand_in
        try:
            return importlib.import_module("xgrammar")
        except (ImportError, AttributeError):  # of a release that names others
            pass
        finally:
            del sys.modules[_WHERE]
    return importlib.import_module("xgrammar")


xgrammar = import_xgrammar()
