"""xgrammar without transformers and torch, which it names when it is imported, and of which it needs nothing here.

It has transformers for that one's tokenizers and ``generate``, and torch for masks that are tensors: here they are
arrays. To import the two takes a second, and 24 MB and 160 MB, in the process that forks for grammars. The engine has
torch anyway.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_NAMED = ("LogitsProcessor", "PreTrainedTokenizerBase", "PreTrainedTokenizerFast")
"""What it names of transformers: the stand-in has empty classes of these names."""


def import_xgrammar() -> Any:
    """The package, by stand-ins for what is not loaded yet, or by the real ones where stand-ins do not do."""
    stand_ins = {}
    if "transformers" not in sys.modules:
        stand_ins["transformers"] = ModuleType("transformers")
        vars(stand_ins["transformers"]).update({name: type(name, (), {}) for name in _NAMED})
    if "torch" not in sys.modules:
        _import_tvm_ffi()
        # Any class that the type of an argument may name, and a function that makes a tensor nobody looks at.
        stand_ins["torch"] = torch = ModuleType("torch")
        vars(torch).update(tensor=lambda *_, **__: None, __getattr__=lambda name: type(name, (), {}))
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("xgrammar")
    except (ImportError, AttributeError):  # of a release that names others
        pass
    finally:
        for name in stand_ins:
            del sys.modules[name]
    return importlib.import_module("xgrammar")


def _import_tvm_ffi() -> None:
    """What xgrammar stands on, which does without torch where that is not installed."""
    absent: Any = None
    sys.modules["torch"] = absent
    try:
        importlib.import_module("tvm_ffi")
    finally:
        del sys.modules["torch"]


xgrammar = import_xgrammar()
