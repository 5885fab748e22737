"""Runs the graphs of a set in the stock onnxruntime.

Memory: one arena for what a run needs while it lasts; weights are inputs and stay where they are (a memory-mapped file or
the caller's arrays), never copied, never packed. Imports onnxruntime and numpy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import onnxruntime

from edge_runtime.errors import ModelError, WireError
from edge_runtime.graphs.check import check_graph

Array = np.ndarray[Any, np.dtype[Any]]
Place = Callable[[str, tuple[int, ...], str], Array]
TYPES = {"tensor(float)": "float32", "tensor(bool)": "bool", "tensor(int64)": "int64", "tensor(uint8)": "uint8"}


ARENA_BYTES = 256 << 20  # of addresses, not of memory; more is taken where a run needs it
# Applied or not by what else a graph gives, it would change the last bits between a block's forward graphs, and so
# between training with and without checkpointing.
UNSTEADY = ["SkipLayerNormFusion"]


class Graph:
    """One ONNX graph, ready to run.

    Attributes:
        inputs, outputs: their names, in the graph's order.
    """

    def __init__(self, name: str, data: bytes, threads: int) -> None:
        """Open a graph, whose bytes may be hostile.

        Raises:
            ModelError: onnxruntime cannot run it, or it has what no graph of ours has (`check.py`).
        """
        try:
            check_graph(data)
        except WireError as error:
            raise ModelError(f"the graph {name!r} is refused: {error}") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what matters arrives as an exception
        _share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.enable_mem_pattern = False
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.name = name
        try:
            self._session = onnxruntime.InferenceSession(
                data, options, providers=["CPUExecutionProvider"], disabled_optimizers=UNSTEADY, enable_fallback=0
            )  # the fallback prints, and tries the same again
        except Exception as error:  # onnxruntime's errors share no type
            raise ModelError(f"this onnxruntime cannot run the graph {name!r}: {_first_line(error)}") from None
        self.inputs = tuple(i.name for i in self._session.get_inputs())
        self.outputs = tuple(o.name for o in self._session.get_outputs())
        self._input_shapes = {i.name: tuple(i.shape) for i in self._session.get_inputs()}
        self._output_shapes = {o.name: (tuple(o.shape), TYPES.get(o.type, "")) for o in self._session.get_outputs()}

    def run_into(
        self, feeds: Mapping[str, Array], place: Place, wanted: Collection[str] | None = None
    ) -> dict[str, Array]:
        """As `run`, with each output written into the array that `place(name, shape, type)` gives for it.

        Args:
            wanted: only these outputs, and of them those that the graph has; what only others need is not computed.

        Raises:
            ModelError, MemoryError: as `run`.
        """
        self._check_feeds(feeds)
        outputs: dict[str, Array] = {}
        kinds = {name: known for name, known in self._output_shapes.items() if wanted is None or name in wanted}
        shapes = {name: self._shape(shape, feeds) for name, (shape, _) in kinds.items()}
        if None in shapes.values():  # some family's dimension is known only when it is there
            values = self.run(feeds)
            for name, value in ((name, values[name]) for name in kinds):
                outputs[name] = place(name, value.shape, self._output_shapes[name][1])
                outputs[name][...] = value
            return outputs
        binding = self._session.io_binding()
        try:
            for name in self.inputs:
                binding.bind_cpu_input(name, np.asarray(feeds[name]))
            for name, (_, kind) in kinds.items():
                array = outputs[name] = place(name, shapes[name] or (), kind)
                binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            self._session.run_with_iobinding(binding, _only_fetched() if len(kinds) < len(self.outputs) else None)
        except ModelError:
            raise
        except Exception as error:  # onnxruntime's errors share no type
            raise self._failure(error) from None
        return outputs

    def _shape(self, shape: tuple[int | str | None, ...], feeds: Mapping[str, Array]) -> tuple[int, ...] | None:
        """An output's shape for these inputs; None unless its dimensions are numbers or products of the inputs' free ones.

        A factor may be a share of a free one: "d2/32" heads of a matrix of d2 rows.
        """
        free = {
            d: size
            for name, dims in self._input_shapes.items()
            for d, size in zip(dims, feeds[name].shape, strict=False)
            if isinstance(d, str)
        }
        factors = [[_factor(f, free) for f in str(d).split("*")] for d in shape]
        if any(f is None for of_dimension in factors for f in of_dimension):
            return None
        return tuple(math.prod(f or 0 for f in of_dimension) for of_dimension in factors)

    def _check_feeds(self, feeds: Mapping[str, Array]) -> None:
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise ModelError(f"the graph {self.name!r} wants {missing[0]!r}, which this model does not have")

    def _failure(self, error: Exception) -> Exception:
        if "alloc" in str(error).lower():
            return MemoryError(_first_line(error))
        return ModelError(f"the graph {self.name!r} fails: {_first_line(error)}")

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name; `feeds` may hold more than the inputs. Neither inputs nor outputs are copied.

        Raises:
            ModelError: an input is missing or has the wrong shape or type.
            MemoryError: there was not enough.
        """
        self._check_feeds(feeds)
        try:
            values = self._session.run(None, {name: feeds[name] for name in self.inputs})
        except Exception as error:  # onnxruntime's errors share no type
            raise self._failure(error) from None
        return dict(zip(self.outputs, values, strict=True))


def _factor(text: str, free: Mapping[str, int]) -> int | None:
    """A number, a free dimension's size, or a whole share of one; None for anything else."""
    name, slash, divisor = text.partition("/")
    size = int(name) if name.isdecimal() else free.get(name)
    if not slash or size is None:
        return size
    share = int(divisor) if divisor.isdecimal() else 0
    return size // share if share and size % share == 0 else None


@functools.cache
def _share_arena() -> None:
    """One arena for the working memory of all graphs, in one region of which only touched pages become resident.

    In the C heap the short-lived tensors of a run leave holes between other allocations, which cost up to three times their
    size; given back to the system after each run, their page faults cost as much time as the work.
    """
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    settings = {
        "max_mem": 0,
        "arena_extend_strategy": 0,
        "initial_chunk_size_bytes": ARENA_BYTES,
        "max_dead_bytes_per_chunk": -1,
    }
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(settings))


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


@functools.cache
def _only_fetched() -> onnxruntime.RunOptions:
    options = onnxruntime.RunOptions()
    options.only_execute_path_to_fetches = True
    return options


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
