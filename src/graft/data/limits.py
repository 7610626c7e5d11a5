"""How fast an endpoint is asked, and how much that may cost."""

from __future__ import annotations

import asyncio
from collections import deque

from graft.data.recipe import GenerateSettings
from graft.errors import ConfigError

WINDOW = 60.0
OVERHEAD = 64
"""Tokens that a chat template may add to a request."""


class Pace:
    """Requests and tokens in any window of a minute, and pauses that the endpoint asks for. Times are in seconds."""

    def __init__(self, requests: int | None, tokens: int | None) -> None:
        self.requests, self.tokens = requests, tokens
        self._sent: deque[list[float]] = deque()  # [time, tokens]
        self._not_before = 0.0

    def hold(self, until: float) -> None:
        """Let nothing start before `until`."""
        self._not_before = max(self._not_before, until)

    def delay(self, now: float, tokens: int) -> float:
        """Seconds from `now` until a request of so many tokens may start; 0: now. One above the limit goes alone."""
        while self._sent and self._sent[0][0] <= now - WINDOW:
            self._sent.popleft()
        wait = self._not_before - now
        if self.requests is not None and len(self._sent) >= self.requests:
            wait = max(wait, self._sent[-self.requests][0] + WINDOW - now)
        if self.tokens is not None and self._sent:
            over = sum(each[1] for each in self._sent) + tokens - self.tokens
            for sent in self._sent:
                if over <= 0:
                    break
                wait, over = max(wait, sent[0] + WINDOW - now), over - sent[1]
        return max(0.0, wait)

    def start(self, now: float, tokens: int) -> list[float]:
        """Count a request; what it gives has the tokens at [1], to be corrected when they are known."""
        entry = [now, float(tokens)]
        self._sent.append(entry)
        return entry


class Budget:
    """What requests cost. Before each its highest price is set aside, so that the limit is never passed.

    A token is at least one byte, and an answer has at most `max_tokens`: that bounds the price of a request.
    """

    def __init__(self, settings: GenerateSettings, spent: float = 0.0) -> None:
        self.limit, self.prices, self.longest = settings.max_cost, settings.price_per_million, settings.max_tokens
        self.spent, self.aside, self._under_way = spent, 0.0, 0
        self._settled = asyncio.Condition()

    def price(self, prompt: int, completion: int) -> float:
        """Of so many tokens."""
        if self.prices is None:
            return 0.0
        return (prompt * self.prices.prompt + completion * self.prices.completion) / 1e6

    async def reserve(self, size: int) -> float:
        """Set the highest price of a request of `size` bytes aside, waiting for others to come out cheaper.

        Raises:
            ConfigError: even when all are settled it would pass `max_cost`.
        """
        cost = self.price(size + OVERHEAD, self.longest)
        async with self._settled:
            while self.limit is not None and self.spent + self.aside + cost > self.limit:
                if not self._under_way:
                    raise ConfigError(
                        f"generate.max_cost: {self.spent:.6g} of {self.limit:g} is spent and the next request may cost "
                        f"{cost:.6g}; raise it and give the same command, which goes on from here"
                    )
                await self._settled.wait()
            self.aside += cost
            self._under_way += 1
        return cost

    async def settle(self, reserved: float, spent: float) -> None:
        """Replace what was set aside by what was spent."""
        async with self._settled:
            self.aside, self.spent = self.aside - reserved, self.spent + spent
            self._under_way -= 1
            self.aside = self.aside if self._under_way else 0.0  # no rounding that adds up
            self._settled.notify_all()
