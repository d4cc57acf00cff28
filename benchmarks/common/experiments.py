"""``evospec``, with the options of experiments: ``python -m benchmarks.common.experiments``."""

from __future__ import annotations

from functools import partial

from evospec.server import cli
from evospec.server.settings import load_settings


def main() -> None:
    """As ``server.cli.main``."""
    cli.load_settings = partial(load_settings, experiments=True)  # type: ignore[attr-defined]
    cli.check_flags = lambda arguments: None  # type: ignore[attr-defined]  # it knows none of them
    cli.main()


if __name__ == "__main__":
    main()
