"""Prometheus metrics of fine-tuning. A scrape shows the totals of the runner's last poll."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from server.finetune.jobs.database import STATUSES, Status


@dataclass(frozen=True, slots=True)
class Totals:
    """The totals of all jobs of the state folder.

    Attributes:
        jobs: the number of jobs by status.
        seconds: for which training processes have run.
    """

    jobs: Mapping[Status, int] = field(default_factory=dict)
    seconds: float = 0.0


class TrainingCollector(Collector):
    """Calls ``totals`` at every scrape."""

    def __init__(self, totals: Callable[[], Totals]) -> None:
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        totals = self._totals()
        jobs = GaugeMetricFamily("manylora_fine_tuning_jobs", "Fine-tuning jobs", labels=["status"])
        for status in STATUSES:
            jobs.add_metric([status], totals.jobs.get(status, 0))
        yield jobs
        yield CounterMetricFamily(
            "manylora_fine_tuning_seconds", "Time for which training processes have run", totals.seconds
        )
