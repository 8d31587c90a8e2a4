"""What a trainer loads to ask `python -m serving`: this one file, needing nothing but Python.

    TRL       GRPOTrainer(reward_funcs=RemoteReward("http://127.0.0.1:5000"), ...)
              trl grpo --reward_funcs serving.client.compound_reward
    verl      reward.custom_reward_function.path=serving/client.py  (its `compute_score`)
    OpenRLHF  --reward.remote_url serving/client.py                  (its `reward_func`)

OpenRLHF needs this file only where a token is asked for; without one it takes the server's
/get_reward itself. Where no address is given, it is SARM_REWARD_URL's; the token is
SARM_REWARD_TOKEN's. `python -m pytest tests/serving/test_client.py`
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

URL, TOKEN = "SARM_REWARD_URL", "SARM_REWARD_TOKEN"
DEFAULT_URL = "http://127.0.0.1:5000"
TRIES = 10
"""A server that restarts is waited for: 75 to 151 s in all, by chance."""
LONGEST_WAIT_S = 30.0
TIMEOUT_S = 180.0
AGAIN = (408, 429, 500, 502, 503, 504)
Columns = dict[str, list[float]]
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A cluster's web proxy is no way to a server beside the job."""


class ServerRefused(RuntimeError):
    """The server's own sentence."""


class RemoteReward:
    """A reward function of TRL's GRPOTrainer and RLOOTrainer: the served compound reward.

    `stop_ids` are the ids at which the policy ends a response, by default those of the policy in
    the server's config; a completion that ends with none of them was cut, and is scored up to its
    last sentence end. `latents` are more to report. Metrics and columns of the completions table
    are those of `sarm.ppo.reward.CompoundReward`.
    """

    __name__ = "compound_reward"

    def __init__(
        self,
        url: str | None = None,
        *,
        stop_ids: Sequence[int] | None = None,
        latents: Sequence[int] = (),
        token: str | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.url, self.token, self.timeout_s = url, token, timeout_s
        self.stop_ids, self.latents = stop_ids, list(latents)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any
    ) -> list[float]:
        """Compound rewards, of strings or messages. Raises ServerRefused."""
        if self.stop_ids is None:
            self.stop_ids = self._ask("/serves", None)["stop_ids"]
        ids = kwargs.get("completion_ids") or [()] * len(completions)
        ended = [len(tokens) > 0 and tokens[-1] in self.stop_ids for tokens in ids]
        found = self.score(prompts, completions, ended)
        extra: Columns = found["extra_logs"]
        if log_metric := kwargs.get("log_metric"):
            for name, value in metrics(found["rewards"], extra).items():
                log_metric(name, value)
        if log_extra := kwargs.get("log_extra"):
            for name, column in extra.items():
                log_extra(name, column)
        rewards: list[float] = found["rewards"]
        return rewards

    def score(
        self, prompts: Sequence[Any], responses: Sequence[Any], ended: Sequence[bool]
    ) -> dict[str, Any]:
        """The server's answer: `rewards`, `scores` and `extra_logs`, a list each."""
        if not prompts:
            return {"rewards": [], "scores": [], "extra_logs": {}}
        items = [
            {"prompt": _said(p), "response": _said(r), "ended": bool(e)}
            for p, r, e in zip(prompts, responses, ended, strict=True)
        ]
        return self._ask("/score", {"items": items, "latents": self.latents})

    def _ask(self, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        return ask(path, body, url=self.url, token=self.token, timeout_s=self.timeout_s)


compound_reward = RemoteReward()
"""For `trl grpo --reward_funcs`, which takes the name of a function."""


def metrics(rewards: Sequence[float], extra: Columns) -> dict[str, float]:
    """Means under the names that our own trainer logs."""
    named = {
        "objective/compound": rewards,
        "objective/scores": extra["sarm_reward"],
        "objective/penalty": extra["penalty"],
        "val/truncated_conversations": extra["truncated"],
        "val/unended": extra["unended"],
    }
    named |= {f"rate/{n[6:]}": column for n, column in extra.items() if n.startswith("fired/")}
    named |= {name: column for name, column in extra.items() if name.startswith("z/")}
    return {name: sum(column) / len(column) for name, column in named.items()}


async def compute_score(
    data_source: Any,
    solution_str: str,
    ground_truth: Any = None,
    extra_info: Mapping[str, Any] | None = None,
    *,
    url: str | None = None,
    **kwargs: Any,
) -> dict[str, float]:
    """verl's reward function of one response: `score`, and every extra field a number of its own.

    The prompt is `extra_info`'s `prompt` or `raw_prompt`, messages or text. verl does not say
    whether a response was cut, so one that ends at no sentence end counts as cut, unless
    `extra_info["ended"]` is true.
    """
    info = extra_info or {}
    prompt = info.get("prompt")
    if prompt is None:
        prompt = info.get("raw_prompt")
    if prompt is None:
        raise ValueError(
            "extra_info has no prompt, and a reward model reads the whole conversation; give the"
            " data set's extra_info a key prompt with the messages"
        )
    item = {
        "prompt": _said(prompt),
        "response": solution_str,
        "ended": bool(info.get("ended", False)),
    }
    found = await asyncio.to_thread(ask, "/score", {"items": [item]}, url=url)
    extra = {name: column[0] for name, column in found["extra_logs"].items()}
    return {"score": found["rewards"][0], **extra}


def reward_func(
    queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any]
) -> dict[str, Any]:
    """OpenRLHF's reward function, of a file given as its remote URL: the server's answer."""
    body = {"query": list(queries), "prompts": list(prompts)}
    return ask("/get_reward", body)


def ask(
    path: str,
    body: Mapping[str, Any] | None,
    *,
    url: str | None = None,
    token: str | None = None,
    timeout_s: float = TIMEOUT_S,
) -> dict[str, Any]:
    """POST a body, or GET where there is none; again while the server is busy or starting. Raises
    ServerRefused with its sentence.
    """
    base = (url or os.environ.get(URL) or DEFAULT_URL).rstrip("/")
    token = token or os.environ.get(TOKEN)
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(base + path, data, headers)
    for tried in range(1, TRIES + 1):
        try:
            with _DIRECT.open(request, timeout=timeout_s) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            told = f"{base}{path} answered {error.code}: {_sentence(error)}"
            if error.code not in AGAIN or tried == TRIES:
                raise ServerRefused(told) from None
        except (OSError, http.client.HTTPException) as error:
            if tried == TRIES:
                kind = getattr(error, "reason", error)
                raise ServerRefused(
                    f"{base}{path} does not answer ({kind}); is `make serve-reward` running there?"
                ) from None
        # not all clients at the same moment
        time.sleep(min(2.0 ** (tried - 1), LONGEST_WAIT_S) * random.uniform(0.5, 1.0))
    raise AssertionError("unreachable")


def _sentence(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"])
    except (ValueError, KeyError, TypeError, OSError):
        return str(error.reason)


def _said(messages: Any) -> Any:
    """Text, or messages as plain dictionaries: data sets give arrays of them."""
    if isinstance(messages, str):
        return messages
    return [
        {"role": m["role"], "content": "" if m.get("content") is None else m["content"]}
        for m in messages
    ]
