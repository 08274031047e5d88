"""Prometheus metrics of the ingress, summed over all ingress replicas.

Each ingress replica counts what it handles. With several replicas, each reports its metrics to one
`MetricsAggregator` every `REPORT_SECONDS`, and `GET /metrics` returns the totals whichever replica
answers: the answering replica's own counts are exact, the others' are at most that old. Counters
and histograms include replicas that have ended since; gauges do not.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from ray import serve
from ray.serve.handle import DeploymentHandle

REPORT_SECONDS = 1.0
EXPIRY_SECONDS = 10.0
"""Time without a report after which a replica's gauges no longer count."""

REGISTRY = CollectorRegistry()
REQUEST_COUNT = Counter(
    "opencharacter_requests",
    "Completed HTTP requests, by route, model and status.",
    ["route", "model", "status"],
    registry=REGISTRY,
)
REQUEST_SECONDS = Histogram(
    "opencharacter_request_seconds",
    "Seconds from the start of a request to the last byte of its response.",
    ["route"],
    registry=REGISTRY,
)
FIRST_TOKEN_SECONDS = Histogram(
    "opencharacter_first_token_seconds",
    "Seconds until the first part of a response: its first tokens if streamed, else all of it.",
    ["model"],
    registry=REGISTRY,
)
TOKEN_COUNT = Counter(
    "opencharacter_tokens",
    "Tokens processed, by model and kind (prompt or completion).",
    ["model", "kind"],
    registry=REGISTRY,
)
ADAPTER_LOADS = Counter(
    "opencharacter_adapter_loads",
    "Adapters loaded into an engine, by model.",
    ["model"],
    registry=REGISTRY,
)
REQUESTS_IN_FLIGHT = Gauge(
    "opencharacter_requests_in_flight",
    "HTTP requests whose response is not complete.",
    registry=REGISTRY,
)
REQUESTS_WAITING = Gauge(
    "opencharacter_requests_waiting",
    "Requests that wait for the first part of a response.",
    registry=REGISTRY,
)

log = logging.getLogger("ray.serve")


def collect() -> list[Metric]:
    """Return this process's metrics."""
    return list(REGISTRY.collect())


def sum_metrics(metrics: Iterable[Metric]) -> list[Metric]:
    """Add up the samples that have the same name and labels.

    Creation times (`..._created`) are left out, because their sum means nothing.
    """
    families: dict[str, Metric] = {}
    totals: dict[tuple[str, str, tuple[tuple[str, str], ...]], float] = {}
    for metric in metrics:
        families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
        for sample in metric.samples:
            key = (metric.name, sample.name, tuple(sample.labels.items()))
            totals[key] = totals.get(key, 0.0) + sample.value
    for (family, name, labels), value in totals.items():
        if not name.endswith("_created"):
            families[family].add_sample(name, dict(labels), value)
    return list(families.values())


class TotalsCollector:
    """Lets `prometheus_client` render metrics that are collected already."""

    def __init__(self, metrics: list[Metric]):
        self.metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Return the metrics."""
        return iter(self.metrics)


def render(metrics: Iterable[Metric]) -> bytes:
    """Render the totals of metrics in Prometheus's text format."""
    totals: Any = TotalsCollector(sum_metrics(metrics))
    return generate_latest(totals)


@serve.deployment(name="metrics", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
class MetricsAggregator:
    """Keeps the latest metrics of every ingress replica."""

    def __init__(self):
        self.reports: dict[str, tuple[float, list[Metric]]] = {}

    async def report(self, replica: str, metrics: list[Metric]) -> None:
        """Replace the metrics of a replica."""
        self.reports[replica] = (time.monotonic(), metrics)

    async def report_and_sum(self, replica: str, metrics: list[Metric]) -> list[Metric]:
        """Replace the metrics of a replica and return the totals over all replicas."""
        await self.report(replica, metrics)
        oldest = time.monotonic() - EXPIRY_SECONDS
        return sum_metrics(
            metric
            for reported, metrics in self.reports.values()
            for metric in metrics
            if reported >= oldest or metric.type != "gauge"
        )


class MetricsReporter:
    """Reports the metrics of one ingress replica and reads the totals.

    Args:
        aggregator: the aggregator; None if this is the only ingress replica.
    """

    def __init__(self, aggregator: DeploymentHandle | None):
        self.aggregator = aggregator
        if aggregator is not None:
            self.replica = serve.get_replica_context().replica_id.unique_id
            self.task = asyncio.create_task(self._report_periodically(aggregator))

    async def render_totals(self) -> bytes:
        """Render the metrics of all ingress replicas."""
        if self.aggregator is None:
            return render(collect())
        return render(await self.aggregator.report_and_sum.remote(self.replica, collect()))

    async def _report_periodically(self, aggregator: DeploymentHandle) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            try:
                await aggregator.report.remote(self.replica, collect())
            except Exception as error:  # the next report replaces this one
                log.warning(f"cannot report metrics ({type(error).__name__}: {error})")
