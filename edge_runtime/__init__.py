"""edge-runtime: finetune a small transformer within a device's real memory, alone or in a fleet, and answer with it.

    from edge_runtime import Device, plan, train, Predictor

The names are imported when they are first used, so that `import edge_runtime` stays small and fast.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_runtime.local import DataOptions, Device, plan, train
    from edge_runtime.predict import Prediction, Predictor
    from edge_runtime.records import TrainSettings

# onnxruntime 1.31 otherwise keeps a device id and a list of what it ran in ~/.cache/Microsoft, and has the code to send it.
# It looks when it is imported; the processes that we start inherit it. A user who sets it to something else is heard.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOME = {
    "DataOptions": "local",
    "Device": "local",
    "Prediction": "predict",
    "Predictor": "predict",
    "TrainSettings": "records",
    "plan": "local",
    "train": "local",
}

__all__ = ["DataOptions", "Device", "Prediction", "Predictor", "TrainSettings", "plan", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edge_runtime' has no attribute {name!r}")
    return getattr(importlib.import_module(f"edge_runtime.{_HOME[name]}"), name)
