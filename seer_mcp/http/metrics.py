"""Figures for the operator, as Prometheus reads them: calls, runs, sandboxes, money. No names of people."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Iterator

from mcp.server.auth.middleware.bearer_auth import RequireAuthMiddleware
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import AnyHttpUrl
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, request_response

from .. import __version__
from ..observe import Call, RunFacts
from ..server import SeerServer
from ..sessions import Register
from ..watch import BUTTONS

CALL_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 1, 5, 15, 45, 120)
RUN_SECONDS = (0.05, 0.5, 2, 10, 60, 600, 3600, 4 * 3600)


class Metrics:
    """Hears what the observer notes; the rest is read when it is asked for."""

    def __init__(self, register: Register, tools: frozenset[str]) -> None:
        self._tools = tools
        self.registry = CollectorRegistry()
        self._calls = Histogram(
            "seer_call_seconds",
            "How long tool calls took.",
            ("tool", "outcome"),
            buckets=CALL_SECONDS,
            registry=self.registry,
        )
        self._runs = Histogram(
            "seer_run_seconds",
            "How long cells and commands ran.",
            ("kind", "state"),
            buckets=RUN_SECONDS,
            registry=self.registry,
        )
        self._output = Counter(
            "seer_run_output_bytes", "What runs put out.", ("kind",), registry=self.registry
        )
        self.registry.register(Standing(register))
        register.observer.on_call = self.call
        register.observer.on_run = self.run

    def call(self, call: Call, seconds: float) -> None:
        tool = call.tool if call.tool in self._tools else "unknown"
        self._calls.labels(tool, call.outcome).observe(seconds)

    def run(self, run: RunFacts, state: str, seconds: float | None, output_bytes: int) -> None:
        self._runs.labels(run.kind, state).observe(seconds or 0.0)
        self._output.labels(run.kind).inc(output_bytes)

    def page(self) -> bytes:
        return generate_latest(self.registry)

    def route(self, metadata: str) -> Route:
        async def answer(request: Request) -> Response:
            return Response(self.page(), media_type=CONTENT_TYPE_LATEST)

        admin = RequireAuthMiddleware(request_response(answer), ["admin"], AnyHttpUrl(metadata))
        return Route("/metrics", admin, methods=["GET"])


class Standing(Collector):
    """What is so at this moment."""

    def __init__(self, register: Register) -> None:
        self._register = register

    def collect(self) -> Iterator[Metric]:
        sandboxes = Tally(
            (s.backend_name, "ended" if s.ended is not None else s.kernel_state)
            for s in self._register.sessions
        )
        kept = GaugeMetricFamily(
            "seer_sandboxes", "Sandboxes that this server knows.", labels=("backend", "state")
        )
        for labels, number in sandboxes.items():
            kept.add_metric(labels, number)
        yield kept
        starts = GaugeMetricFamily("seer_starts", "Sandboxes that are being started.")
        starts.add_metric((), self._register.starting)
        yield starts
        book, now = self._register.book, time.time()
        spent = book.spent(0.0, now)
        dollars = CounterMetricFamily(
            "seer_spent_dollars", "What all sandboxes of the state folder cost, as far as is known."
        )
        dollars.add_metric((), spent.dollars)
        yield dollars
        minutes = CounterMetricFamily("seer_gpu_minutes", "Minutes of GPUs that they had.")
        minutes.add_metric((), spent.gpu_minutes)
        yield minutes
        burning = book.burning(now)
        rate = GaugeMetricFamily("seer_dollars_an_hour", "What costs money now.")
        rate.add_metric((), burning.per_second * 3600 if burning else 0.0)
        yield rate
        version = GaugeMetricFamily("seer_info", "The version of this server.", labels=("version",))
        version.add_metric((__version__,), 1)
        yield version


def metrics_of(server: SeerServer, metadata: str) -> Route:
    """The route /metrics, for tokens with the scope admin."""
    return Metrics(server.register, server.tool_names | BUTTONS).route(metadata)
