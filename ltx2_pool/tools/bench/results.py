"""What a load run saw: each request, and each level of pushing."""

from __future__ import annotations

from dataclasses import dataclass, field

from ltx2_pool.tools.bench.client import Sample


@dataclass(frozen=True)
class Level:
    """How hard to push: `rate` requests per second whatever happens, or `concurrency` clients that ask again."""

    rate: float | None = None
    concurrency: int | None = None

    def __str__(self) -> str:
        return f"{self.rate:g} requests/s" if self.rate is not None else f"concurrency {self.concurrency}"

    @property
    def load(self) -> float:
        """The number that stands for it on an axis."""
        return self.rate if self.rate is not None else float(self.concurrency or 0)


@dataclass(frozen=True)
class Record:
    """One request, a line of requests.csv."""

    level: str
    number: int
    shape: str
    state: str
    """`hot` or `cold` when it was sent; empty when the worker's status is not known."""
    sent_s: float
    """Since its level began."""
    seconds: float
    wait_s: float | None
    status: int
    bytes: int
    problem: str


@dataclass
class Result:
    """One level's run."""

    level: Level
    seconds: float
    records: list[Record] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    """Their time is that since the level began."""

    @property
    def good(self) -> list[Record]:
        return [r for r in self.records if not r.problem]

    @property
    def videos_per_minute(self) -> float:
        return 60 * len(self.good) / self.seconds
