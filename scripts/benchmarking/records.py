"""Raw results: one JSON file of one device, which several calls fill."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from swinq.errors import ConfigError

Key = tuple[str, int, str]  # model, batch, form


class Record:
    """Rows by model, batch and form, with the call that measured each.

    Attributes:
        device: the GPU of all rows; "" before the first.
        calls: what was run, with versions; rows hold an index into it.
    """

    def __init__(self, path: Path | None) -> None:
        """Read what earlier calls left.

        Raises:
            ConfigError: the file is there and is no such record.
        """
        self.path = path
        self.device = ""
        self.calls: list[dict[str, Any]] = []
        self._rows: dict[Key, dict[str, Any]] = {}
        if path and path.exists():
            try:
                read = json.loads(path.read_text())
                self.device, self.calls = read["device"], read["calls"]
                self._rows = {key(row): row for row in read["rows"]}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{path} is no record of this benchmark ({type(error).__name__}: {error})",
                    "name another file, or remove this one",
                ) from error

    def begin(self, device: str, call: dict[str, Any]) -> None:
        """Announce a call that measures on a device.

        Raises:
            ConfigError: the record is of another device.
        """
        if self.device not in ("", device):
            raise ConfigError(
                f"{self.path} was measured on {self.device}, this is {device}: times of two "
                "devices do not compare",
                "name another file for this device",
            )
        self.device = device
        self.calls.append(call)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row of the present call, in place of an earlier one, and save everything.

        A failure does not replace a measurement.
        """
        earlier = self._rows.get(key(row))
        if "error" in row and earlier is not None and "error" not in earlier:
            return
        self._rows[key(row)] = {**row, "call": len(self.calls) - 1}
        self.save()

    def save(self) -> None:
        """Write the file whole or not at all."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".part")
        content = {"device": self.device, "calls": self.calls, "rows": self.rows()}
        beside.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(beside, self.path)

    def rows(self) -> list[dict[str, Any]]:
        """All rows, failures too."""
        return list(self._rows.values())

    def measured(self) -> set[Key]:
        """Keys of rows that hold times."""
        return {k for k, row in self._rows.items() if "error" not in row}

    def find(self, model: str, batch: int, form: str) -> dict[str, Any] | None:
        """A row that holds times, or None."""
        row = self._rows.get((model, batch, form))
        return row if row is not None and "error" not in row else None


def key(row: dict[str, Any]) -> Key:
    """What identifies a row."""
    return row["model"], row["batch"], row["form"]
