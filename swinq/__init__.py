"""INT8 Swin Transformers: calibrate, judge, export and run them.

The Python API lives in `swinq.api` and is reachable from here by the names in `__all__`. It is
loaded at the first use, so that `import swinq` and `import swinq.int8` stay light.
"""

import importlib
import os
from typing import Any

__version__ = "0.1.0"

# Intel's MKL otherwise rounds differently with the number of threads and rows, and calibration
# promises the same bits. It costs nothing measurable. MKL reads it at its first use.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

# Name here -> name in swinq.api. No name may be that of a submodule: once `swinq.export` is
# imported, Python binds the module under that name and the function would be gone.
_API = {
    "load": "load",
    "cuda_model": "cuda_model",
    "calibrate": "calibrate",
    "evaluate_model": "evaluate",
    "export_model": "export",
    "run": "run",
}

__all__ = [
    "__version__",
    "load",
    "cuda_model",
    "calibrate",
    "evaluate_model",
    "export_model",
    "run",
]


def __getattr__(name: str) -> Any:
    """Look an API name up in `swinq.api`, imported now if it was not before (PEP 562)."""
    if name not in _API:
        raise AttributeError(f"module 'swinq' has no attribute {name!r}")
    return getattr(importlib.import_module("swinq.api"), _API[name])


def __dir__() -> list[str]:
    """List the module's own names and the API's."""
    return sorted({*globals(), *_API})
