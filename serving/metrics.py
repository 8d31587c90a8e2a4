"""What the server counts, for Prometheus: `Metrics().text()`. Numbers alone, never a text.

Each server has a registry of its own, so that two in one process do not mix.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        how: Any = {"namespace": "sarm_reward", "registry": self.registry}
        self.requests = Counter("requests", "Requests answered.", ["route", "status"], **how)
        self.seconds = Histogram(
            "request_seconds",
            "From the first byte to the answer.",
            ["route"],
            buckets=SECONDS,
            **how,
        )
        self.conversations = Counter("conversations", "Conversations scored.", **how)
        self.tokens = Counter("tokens", "Tokens scored, shared prompts counted each time.", **how)
        self.scoring = Counter("scoring_seconds", "Time spent in forward passes.", **how)
        self.batches = Histogram(
            "batch_conversations", "Conversations a forward pass.", buckets=SIZES, **how
        )
        self.fired = Counter("fired", "Conversations in which a latent fires.", ["latent"], **how)
        self.queue = Gauge("queue_conversations", "Conversations waiting or being scored.", **how)
        self.begun = Gauge("scoring_conversations", "Conversations being scored.", **how)
        self.ready = Gauge("ready", "1 while a scoring process is up.", **how)
        self.deaths = Counter("scoring_process_deaths", "Scoring processes that died.", **how)

    def seen(self, message: dict[str, Any]) -> None:
        """Of the scoring process, see `serving.pool`."""
        if "batch" in message:
            self.batches.observe(message["batch"])
            self.conversations.inc(message["batch"])
            self.tokens.inc(message["tokens"])
            self.scoring.inc(message["seconds"])
        elif "answer" in message:
            for name, column in message["answer"]["extra_logs"].items():
                if name.startswith("fired/"):
                    self.fired.labels(name.removeprefix("fired/")).inc(sum(column))
        elif "died" in message:
            self.deaths.inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
