"""When a simulated fleet is asked for which key: Poisson, in bursts, over a day, zipf over the menu."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

from ltx2_pool.words.shapes import Key

Pattern = Literal["poisson", "bursts", "day"]
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)

DAY = 86400.0
SWING = 0.5
"""The busiest hour of a day has so much more than the mean, the quietest so much less."""
BURST, BURSTS = 30.0, 0.2
"""Seconds that a burst lasts on the average, and the share of time that is in one."""
BURST_RATE = 3.0
"""Times the mean rate, in a burst."""


def zipf(keys: Sequence[Key]) -> dict[Key, float]:
    """Share of each key: the n-th has 1/n of the first's (Zipf's law with exponent 1). Sums to 1."""
    whole = sum(1 / n for n in range(1, len(keys) + 1))
    return {key: 1 / n / whole for n, key in enumerate(keys, 1)}


def arrivals(
    pattern: Pattern, rate: float, shares: Mapping[Key, float], seconds: float, seed: int
) -> Iterator[tuple[float, Key]]:
    """Moments from 0 to `seconds`, each with the key that is asked for; `rate` a second on the average.

    A day's rate changes so slowly that between two arrivals that of the first one's moment is kept.
    """
    chance = random.Random(seed)
    keys, cumulative, total = list(shares), [], 0.0
    for share in shares.values():
        total += share
        cumulative.append(total)
    now, until, burst = 0.0, 0.0, True
    while now < seconds:
        now_rate = rate
        if pattern == "day":
            now_rate *= 1 + SWING * math.sin(2 * math.pi * (now / DAY - 0.25))
        elif pattern == "bursts":
            while now >= until:
                burst = not burst
                until += chance.expovariate(1 / (BURST if burst else BURST * (1 - BURSTS) / BURSTS))
            now_rate *= BURST_RATE if burst else (1 - BURSTS * BURST_RATE) / (1 - BURSTS)
        now += chance.expovariate(now_rate)
        if pattern == "bursts" and now >= until:
            now = until  # the rate changes there, and an exponential gap has no memory: it may be drawn again
        elif now < seconds:
            yield now, chance.choices(keys, cum_weights=cumulative)[0]
