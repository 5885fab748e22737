"""Server optimizers: from the mean delta of a round to the change of a tensor, with a state that lasts over rounds.

Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295, algorithm 2 (`fedadam`, `fedyogi`), with D the mean delta:

    m <- b1 m + (1 - b1) D
    v <- b2 v + (1 - b2) D^2                   fedadam
    v <- v - (1 - b2) D^2 sign(v - D^2)        fedyogi
    w <- w + rate * m / (sqrt(v) + tau)        m begins at 0, v at tau^2

and `fedavgm`, Hsu et al., arXiv 1909.06335: m <- b1 m + D, w <- w + rate * m. `fedavg` with rate 1 is the mean itself.
Elementwise, so a tensor of adapters is a tensor like any other. A tensor that nobody trained in a round takes no step and
keeps its state (reading: the papers' clients train everything). Computed in float64; kept as float32, as the weights are.
One tensor is in memory at a time. numpy inside functions; no ledger, no network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import StoreError
from edge_runtime.store import BlobStore

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class ServerSettings:
    """A server optimizer and its numbers, as in `[run]` of fleet.toml."""

    name: str = "fedavg"
    learning_rate: float = 1.0
    momentum: float = 0.9  # of fedavgm; b1 of fedadam and fedyogi
    beta2: float = 0.99
    tau: float = 1e-3


# (settings, mean delta float64 (n,), state float64 (k, n) or None at first) -> (change of the tensor, state after it)
Rule = Callable[[ServerSettings, "Array", "Array | None"], "tuple[Array, Array | None]"]


def fedavg(s: ServerSettings, delta: Array, state: Array | None) -> tuple[Array, Array | None]:
    """The mean itself, times the rate."""
    return s.learning_rate * delta, None


def fedavgm(s: ServerSettings, delta: Array, state: Array | None) -> tuple[Array, Array | None]:
    """Momentum. State: m."""
    m = delta[None] if state is None else s.momentum * state + delta
    return s.learning_rate * m[0], m


def fedadam(s: ServerSettings, delta: Array, state: Array | None) -> tuple[Array, Array | None]:
    """Adam without bias correction, as published. State: m, v."""
    m, v = _begun(s, delta, state)
    return _adaptive(s, delta, m, s.beta2 * v + (1 - s.beta2) * delta**2)


def fedyogi(s: ServerSettings, delta: Array, state: Array | None) -> tuple[Array, Array | None]:
    """Yogi: v moves by at most (1 - b2) D^2. State: m, v."""
    import numpy as np

    m, v = _begun(s, delta, state)
    square = delta**2
    return _adaptive(s, delta, m, v - (1 - s.beta2) * square * np.sign(v - square))


def _begun(s: ServerSettings, delta: Array, state: Array | None) -> tuple[Array, Array]:
    import numpy as np

    return (state[0], state[1]) if state is not None else (np.zeros_like(delta), np.full_like(delta, s.tau**2))


def _adaptive(s: ServerSettings, delta: Array, m: Array, v: Array) -> tuple[Array, Array]:
    import numpy as np

    m = s.momentum * m + (1 - s.momentum) * delta
    return s.learning_rate * m / (np.sqrt(v) + s.tau), np.stack([m, v])


SERVER_OPTIMIZERS: dict[str, Rule] = {"fedavg": fedavg, "fedavgm": fedavgm, "fedadam": fedadam, "fedyogi": fedyogi}
OWN_RATES = {"fedavg": 1.0, "fedavgm": 1.0, "fedadam": 0.03, "fedyogi": 0.03}  # where fleet.toml names none
MEND = "put the fleet's folder back from a backup, or give [run] another name, which begins without a state"


class ServerOptimizer:
    """One round's steps, tensor after tensor; states are blobs on this disk.

    Attributes:
        states: the state of every tensor that has one, after the steps taken so far.
    """

    def __init__(self, settings: ServerSettings, states: Mapping[str, bytes], store: BlobStore) -> None:
        """Args: states: of the model version that this round began with."""
        self._settings, self._before, self._store = settings, states, store
        self.states: dict[str, bytes] = dict(states)

    def step(self, name: str, delta: Array) -> Array:
        """The change of one tensor, flat float64; its state goes into the store.

        Raises:
            StoreError: the state that it had is lost or damaged.
        """
        change, after = SERVER_OPTIMIZERS[self._settings.name](self._settings, delta, self._state(name, delta.size))
        if after is not None:
            self.states[name] = self._store.put(after.astype("<f4").tobytes())
        return change

    def _state(self, name: str, size: int) -> Array | None:
        """None at first, and where the tensor has had another size."""
        import numpy as np

        if name not in self._before:
            return None
        path = self._store.path(self._before[name])
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StoreError(f"the state of the server optimizer is lost ({error}): {MEND}") from None
        if hashlib.sha256(data).digest() != self._before[name]:
            raise StoreError(f"{path}, a state of the server optimizer, is damaged: {MEND}")
        count = len(data) // 4 // size if size else 0
        if not count or len(data) != 4 * count * size:
            return None
        return np.frombuffer(data, "<f4").astype(np.float64).reshape(count, size)
