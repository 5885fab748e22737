"""What a server counts, as Prometheus reads it (text format 0.0.4). Not thread-safe: one event loop counts.

Paths that the server does not have count as one, so that clients cannot make the counters grow. Imports nothing of ours.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Requests by path and status, their seconds, and the texts that were classified."""

    def __init__(self, paths: Collection[str]) -> None:
        self._paths = paths
        self._requests: Counter[tuple[str, int]] = Counter()
        self._buckets: Counter[tuple[str, float]] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self.texts = 0

    @property
    def requests(self) -> int:
        """All that were answered, refusals too."""
        return sum(self._requests.values())

    def observe(self, path: str, status: int, seconds: float) -> None:
        """One answer."""
        name = path if path in self._paths else "other"
        self._requests[name, status] += 1
        self._seconds[name] += seconds
        for bound in BUCKETS_S:
            self._buckets[name, bound] += seconds <= bound

    def text(self, gauges: Mapping[str, tuple[str, str, float]]) -> str:
        """Everything.

        Args:
            gauges: name -> (type, help, value) of what others know.
        """
        lines = _head("edge_runtime_requests_total", "counter", "Answers by path and status.")
        for (path, status), count in sorted(self._requests.items()):
            lines.append(f'edge_runtime_requests_total{{path="{path}",status="{status}"}} {count}')
        lines += _head("edge_runtime_request_seconds", "histogram", "Seconds from a whole request to its answer.")
        for path in sorted(self._seconds):
            total = sum(count for (name, _), count in self._requests.items() if name == path)
            for bound in BUCKETS_S:
                lines.append(
                    f'edge_runtime_request_seconds_bucket{{path="{path}",le="{bound:g}"}} {self._buckets[path, bound]}'
                )
            lines.append(f'edge_runtime_request_seconds_bucket{{path="{path}",le="+Inf"}} {total}')
            lines.append(f'edge_runtime_request_seconds_sum{{path="{path}"}} {self._seconds[path]:.6f}')
            lines.append(f'edge_runtime_request_seconds_count{{path="{path}"}} {total}')
        own = {"edge_runtime_texts_total": ("counter", "Texts that were classified.", float(self.texts))}
        for name, (kind, what, value) in {**own, **gauges}.items():
            lines += [*_head(name, kind, what), f"{name} {value:.15g}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, what: str) -> list[str]:
    return [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
