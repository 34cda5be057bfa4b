"""One run of the demo, which many tests look at."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.commands.command_line import Ran, done


@dataclass(frozen=True)
class Demo:
    """What `--calib` without any model or data has left behind."""

    ran: Ran
    folder: Path

    def checkpoint(self, kind: str) -> Path:
        """The file of a kind: "calib", "int8_mode1" or "int8_mode2"."""
        return self.folder / f"micro_swin_digits_{kind}.safetensors"


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo, run once; its files are not to be changed."""
    output = tmp_path_factory.mktemp("demo")
    ran = done("--calib", "--output", output, "--sensitivity-images", "2")
    return Demo(ran, output / "micro_swin_digits" / "default")
