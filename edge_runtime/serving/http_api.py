"""What `edge-runtime serve` answers over HTTP: predictions, health, metrics, and a description of itself.

Not the protocol (`http_server.py`), not the model (`live_model.py`). Texts are neither logged nor kept. A page of another
site cannot use it through a visitor's browser: requests must be JSON and, on loopback, name a loopback host.

Memory: `MAX_WAITING` requests of at most `Limits.body_bytes`, and the answers to them of `MAX_PROBABILITIES` numbers each.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from edge_runtime.errors import EdgeError
from edge_runtime.hardware import process_memory
from edge_runtime.predict import Prediction
from edge_runtime.serving.http_pages import PAGE, PAGE_POLICY, PATHS, openapi
from edge_runtime.serving.http_server import HttpError, Request, Response, to_json
from edge_runtime.serving.live_model import LiveModel
from edge_runtime.serving.metrics import CONTENT_TYPE, Metrics

MAX_TEXTS = 256  # in one request
MAX_PROBABILITIES = 1 << 16  # in one answer: fewer texts where a model has very many labels
MAX_WAITING = 64  # requests whose answer is not there yet
WORKERS = 2  # so that a short request need not wait for a long one; each computes on all threads
ANSWER_S = 60.0


class Api:
    """Answers requests on one event loop, and lets threads compute."""

    def __init__(self, model: LiveModel, host: str) -> None:
        self._model, self._own_hosts = model, _loopback_names(host)
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="predict")
        self._waiting = 0
        self._started_at = time.time()
        self.metrics = Metrics(PATHS)
        self.num_connections: Callable[[], int] = lambda: 0
        self._routes: dict[tuple[str, str], Callable[[Request], Awaitable[Response]]] = {
            ("GET", "/"): self._page,
            ("GET", "/health"): self._health,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/openapi.json"): self._openapi,
            ("POST", "/predict"): self._predict,
            ("POST", "/predict/batch"): self._predict_batch,
        }

    async def answer(self, request: Request) -> Response:
        """One request's answer.

        Raises:
            HttpError: it is refused.
        """
        self._check_host(request.headers.get("host", ""))
        method = "GET" if request.method == "HEAD" else request.method
        route = self._routes.get((method, request.path))
        if route is None:
            if allowed := [verb for verb, path in self._routes if path == request.path]:
                raise HttpError(405, f"{request.path} takes {allowed[0]}", Allow=", ".join(allowed))
            raise HttpError(404, f"there is no {request.path[:100]}: see /openapi.json")
        return await route(request)

    def close(self) -> None:
        """Compute no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _check_host(self, host: str) -> None:
        name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
        if self._own_hosts and name and name.lower() not in self._own_hosts:
            raise HttpError(403, "this server answers on loopback, under the names " + ", ".join(self._own_hosts))

    # predictions

    async def _predict(self, request: Request) -> Response:
        text = _fields(request, "text")
        if not isinstance(text, str):
            raise HttpError(422, "text must be a string")
        (found,) = await self._classify([text])
        return Response(to_json(_record(found)))

    async def _predict_batch(self, request: Request) -> Response:
        texts = _fields(request, "texts")
        most = max(1, min(MAX_TEXTS, MAX_PROBABILITIES // len(self._model.labels)))
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise HttpError(422, "texts must be a list of strings")
        if len(texts) > most:
            raise HttpError(413, f"texts has {len(texts)} items, the limit is {most}")
        return Response(to_json({"predictions": [_record(found) for found in await self._classify(texts)]}))

    async def _classify(self, texts: Sequence[str]) -> list[Prediction]:
        """Predictions from one version of the model, computed in a thread."""
        if self._waiting >= MAX_WAITING:
            raise HttpError(503, f"{MAX_WAITING} requests are waiting already", Retry_After="1")
        self._waiting += 1
        try:
            computing = asyncio.get_running_loop().run_in_executor(self._pool, self._model.predict, texts)
            found = await asyncio.wait_for(computing, ANSWER_S)
        except asyncio.TimeoutError:
            raise HttpError(503, f"no answer within {ANSWER_S:g} s: send fewer texts", Retry_After="10") from None
        except EdgeError as error:
            raise HttpError(500, str(error)) from None
        finally:
            self._waiting -= 1
        self.metrics.texts += len(texts)
        return found

    # about itself

    async def _health(self, request: Request) -> Response:
        model = self._model
        return Response(
            to_json(
                {
                    "status": "degraded" if model.refused else "ok",
                    "model_version": model.model_version,
                    "pinned": model.pinned,
                    "labels": list(model.labels),
                    "max_length": model.max_length,
                    "loaded_at": round(model.loaded_at, 3),
                    "swaps": model.swaps,
                    "refused": [{"model_version": number, "reason": why} for number, why in model.refused.items()],
                }
            )
        )

    async def _metrics(self, request: Request) -> Response:
        model = self._model
        text = self.metrics.text(
            {
                "edge_runtime_model_version": (
                    "gauge",
                    "The version that answers; 0 for none.",
                    model.model_version or 0,
                ),
                "edge_runtime_model_loaded_timestamp_seconds": ("gauge", "When it took over.", model.loaded_at),
                "edge_runtime_swaps_total": ("counter", "Versions that took over.", model.swaps),
                "edge_runtime_refused_versions": ("gauge", "Versions here that do not answer.", len(model.refused)),
                "edge_runtime_truncated_texts_total": (
                    "counter",
                    "Texts of which a rest was not read.",
                    model.num_truncated,
                ),
                "edge_runtime_waiting_requests": ("gauge", "Requests that are not answered yet.", self._waiting),
                "edge_runtime_connections": ("gauge", "Open connections.", self.num_connections()),
                "process_start_time_seconds": ("gauge", "When this process began to serve.", self._started_at),
                "process_resident_memory_bytes": ("gauge", "Resident memory.", process_memory().get("VmRSS", 0)),
            }
        )
        return Response(text.encode(), content_type=CONTENT_TYPE)

    async def _openapi(self, request: Request) -> Response:
        return Response(to_json(openapi(MAX_TEXTS)))

    async def _page(self, request: Request) -> Response:
        policy = {"content-security-policy": PAGE_POLICY}
        return Response(PAGE.encode(), content_type="text/html; charset=utf-8", headers=policy)


def _fields(request: Request, name: str) -> Any:
    """The one field of a JSON body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HttpError(415, "the body must be JSON, with Content-Type: application/json")
    try:
        # a number is wrong here anyway, and one of a million digits would take Python 3.10 minutes
        body = json.loads(request.body, parse_int=float)
    except (ValueError, RecursionError) as error:
        raise HttpError(400, f"the body is not JSON: {str(error)[:100]}") from None
    if not isinstance(body, dict) or set(body) != {name}:
        raise HttpError(422, f'the body must be an object with the one key "{name}"')
    return body[name]


def _record(found: Prediction) -> dict[str, Any]:
    return {
        "label": found.label,
        "probability": found.probability,
        "probabilities": dict(found.probabilities),
        "model_version": found.model_version,
        "truncated": found.truncated,
    }


def _loopback_names(host: str) -> list[str]:
    """The names that a server on this address is called by, or none where it is not on loopback."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host.lower() == "localhost"
    return sorted({"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host.lower()}) if loopback else []
