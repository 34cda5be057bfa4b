"""Entry of `torchrun swinq/main.py`: puts the project's root on the path and hands over to cli."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a script, sys.path[0] is swinq/ itself: its modules could shadow others'.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from swinq.cli import main

    sys.exit(main())
