"""The record of ``benchmarks.attack`` and its table; also ``python -m benchmarks.attack.report FILE.json``."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.attack.attacks import ATTACKS
from benchmarks.attack.bars import Bar
from benchmarks.common.machine import cpu_description, git_commit

BEFORE, AFTER = "before", "after"


class Record:
    """What each attack showed, kept in a JSON file: an attack that runs again replaces its own figures only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.attacks: dict[str, Any] = {}
        self._read()

    def add(self, name: str, side: str, source: Path, figures: dict[str, float]) -> None:
        """Figures of a side, of the server of ``source``, on this machine."""
        self._read()  # another run may have added to it
        self.attacks.setdefault(name, {})[side] = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": git_commit(source),
            "cpu": cpu_description(),
            "load_average": os.getloadavg()[0],
            "figures": figures,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({"attacks": self.attacks}, indent=1))

    def _read(self) -> None:
        if self._path.exists():
            self.attacks = json.loads(self._path.read_text())["attacks"]

    def figures(self, name: str, side: str) -> dict[str, float]:
        """Empty where that attack did not run."""
        figures: dict[str, float] = self.attacks.get(name, {}).get(side, {}).get("figures", {})
        return figures

    def holds(self, name: str, figure: str, bar: Bar) -> bool | None:
        """Whether an attack's figure is as it must be; None: it is not known."""
        value = self.figures(name, AFTER).get(figure)
        return None if value is None else bar.holds(value, self.figures(name, BEFORE).get(figure))

    def table(self) -> Table:
        table = Table("attack", "figure", BEFORE, AFTER, "bar", "holds")
        for name in (name for name in ATTACKS if name in self.attacks):
            for figure, bar in ATTACKS[name].bars.items():
                shown = [_shown(self.figures(name, side).get(figure)) for side in (BEFORE, AFTER)]
                holds = {True: "yes", False: "NO", None: "–"}[self.holds(name, figure, bar)]
                table.add_row(name, figure, *shown, str(bar), holds)
        return table


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def main(record: Annotated[Path, typer.Argument(help="A JSON file of benchmarks.attack.")]) -> None:
    """Prints the table of a record again."""
    Console(width=160).print(Record(record).table())


if __name__ == "__main__":
    typer.run(main)
