"""dclr: self-supervised video representation learning by dual contrastive learning (DCLR, ACM MM 2022).

    import dclr

    model = dclr.load("runs/ucf")
    model.embed("video.mp4")

The names below are imported when they are first used, so `import dclr` takes no time.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dclr.errors import UserError
    from dclr.inference import VideoModel, find_videos, load

# torch's C++ code prints 20 lines of addresses when a connection to another rank ends. Our one line says which rank
# failed. torch reads the variable when it is first imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

__version__ = "0.2.0"

__all__ = ["UserError", "VideoModel", "__version__", "find_videos", "load"]

_MODULES = {
    "UserError": "dclr.errors",
    "VideoModel": "dclr.inference",
    "find_videos": "dclr.inference",
    "load": "dclr.inference",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module 'dclr' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
