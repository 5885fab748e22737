"""Runs the graphs of a set in the stock onnxruntime.

Memory: no arena and no memory plan, so that what a run needs is given back when it ends; weights are inputs and stay
where they are (a memory-mapped file or the caller's arrays), never copied, never packed. Imports onnxruntime and numpy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnxruntime

from edge_runtime.errors import ModelError

Array = np.ndarray[Any, np.dtype[Any]]


class Graph:
    """One ONNX graph, ready to run.

    Attributes:
        inputs, outputs: their names, in the graph's order.
    """

    def __init__(self, name: str, data: bytes, threads: int) -> None:
        """Raises ModelError if onnxruntime cannot run the graph."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what matters arrives as an exception
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.name = name
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no type
            raise ModelError(f"this onnxruntime cannot run the graph {name!r}: {_first_line(error)}") from None
        self.inputs = tuple(i.name for i in self._session.get_inputs())
        self.outputs = tuple(o.name for o in self._session.get_outputs())

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name; `feeds` may hold more than the inputs. Neither inputs nor outputs are copied.

        Raises:
            ModelError: an input is missing or has the wrong shape or type.
            MemoryError: there was not enough.
        """
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise ModelError(f"the graph {self.name!r} wants {missing[0]!r}, which this model does not have")
        try:
            values = self._session.run(None, {name: feeds[name] for name in self.inputs})
        except Exception as error:  # as above
            if "alloc" in str(error).lower():
                raise MemoryError(_first_line(error)) from None
            raise ModelError(f"the graph {self.name!r} fails: {_first_line(error)}") from None
        return dict(zip(self.outputs, values, strict=True))


class Graphs:
    """The graphs of a set, each opened when it is first used."""

    def __init__(self, graphs: Mapping[str, bytes], threads: int) -> None:
        self._data, self._threads = graphs, threads
        self._open: dict[str, Graph] = {}

    def __getitem__(self, name: str) -> Graph:
        if name not in self._open:
            if name not in self._data:
                raise ModelError(f"the model's graph set has no graph {name!r}: derive it again with this version")
            self._open[name] = Graph(name, self._data[name], self._threads)
        return self._open[name]

    def open(self, names: Collection[str]) -> None:
        """Open these now, so that the first step does not wait for them."""
        for name in names:
            self[name]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
