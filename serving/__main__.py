"""Serve the compound reward of a run, or of a config: `python -m serving [--config C] [--run R]
[--address-file F] [key=value ...]`; `make serve-reward RUN=...`.

Prints one line once it can score, and again when it stops. A token in the environment variable
SARM_REWARD_TOKEN is asked of every request. On SIGTERM it takes no more requests, ends those under
way (`serve.grace_s`) and exits with 0.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

from sarm.cli import ended
from sarm.config import Config, UserError
from sarm.run import config_of, write_atomic
from serving.app import make_app
from serving.metrics import Metrics
from serving.pool import GaveUp, Pool
from serving.server import CONNECTIONS, StoppableServer, quiet_logs, settings

TOKEN = "SARM_REWARD_TOKEN"
TOKEN_LETTERS = 16


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving", description=__doc__)
    parser.add_argument("--config", help="YAML; where left out, the run's own")
    parser.add_argument("--run", help="run directory, whose selection says what is penalised")
    parser.add_argument("--address-file", type=Path, help="written with the URL while it is up")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    return ended(lambda: serve(args), args.run or "")


def serve(args: argparse.Namespace) -> int:
    if args.config is None and args.run is None:
        raise UserError("give a run as --run, or a config with serve.penalised as --config")
    config = config_of(args.run or "", args.config, args.overrides)
    token = token_of(os.environ, config.serve.host)
    quiet_logs()
    listener = bound(config.serve.host, config.serve.port)
    run = None if args.run is None else str(Path(args.run).absolute())
    try:
        return asyncio.run(served(config, run, listener, token, args.address_file))
    finally:
        listener.close()


async def served(
    config: Config,
    run: str | None,
    listener: socket.socket,
    token: str | None,
    address_file: Path | None,
) -> int:
    """Serve until told to stop; 0. Raises UserError where scoring cannot be started."""
    metrics = Metrics()
    pool = Pool(
        {"config": config.model_dump(mode="json"), "run": run},
        max_queue=config.serve.max_queue,
        timeout_s=config.serve.timeout_s,
        seen=metrics.seen,
    )
    app = make_app(config, pool, token, metrics)
    server = StoppableServer(settings(app, config.serve.grace_s))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    url = url_of(config.serve.host, listener)
    try:
        await announced(pool, serving, url, token, address_file)
        await asyncio.wait((serving, pool.gave_up), return_when=asyncio.FIRST_COMPLETED)
    finally:
        if address_file is not None:
            address_file.unlink(missing_ok=True)
        server.should_exit = True
        await serving
        await pool.stop()
    if pool.gave_up.done():
        raise UserError(f"scoring could not go on: {pool.gave_up.result()}")
    print("stopped", flush=True)
    return 0


async def announced(
    pool: Pool, serving: asyncio.Task[None], url: str, token: str | None, file: Path | None
) -> None:
    """Say what is served and where, once it is. Raises UserError where scoring cannot start."""
    starting = asyncio.create_task(pool.start())
    await asyncio.wait((starting, serving), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():  # asked to stop before it was ready
        starting.cancel()
        return
    try:
        about = await starting
    except GaveUp as error:
        raise UserError(str(error)) from None
    print(f"{url} serves {words(about)}; {'token asked for' if token else 'no token'}", flush=True)
    if about["transcripts"]:
        print(f"warning: /get_reward refuses all: {about['transcripts']}", file=sys.stderr)
    if file is not None:
        write_atomic(file, f"{url}\n".encode())


def words(about: dict[str, Any]) -> str:
    """What is served, in words."""
    penalised = ", ".join(f"{p['latent']} ({p['alpha']:.3g})" for p in about["penalised"])
    penalty = f"{about['kind']} penalty on latents {penalised}" if penalised else "no penalty"
    return f"the reward under {penalty}, {about['dtype']} on {about['device']}"


def token_of(environ: Any, host: str) -> str | None:
    """The token to ask for. Raises UserError where an open address has none, or a guessable one."""
    token = environ.get(TOKEN) or None
    if token is not None and not re.fullmatch(rf"[!-~]{{{TOKEN_LETTERS},}}", token):
        raise UserError(
            f"{TOKEN} must have at least {TOKEN_LETTERS} letters, all ASCII and no spaces; make one"
            " with: openssl rand -hex 32"
        )
    if token is None and not is_loopback(host):
        raise UserError(
            f"serve.host {host} is open to others, and {TOKEN} is not set; set it to a secret, as"
            " by openssl rand -hex 32, or serve on 127.0.0.1"
        )
    return token


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises UserError."""
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(info[0], socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(info[4])
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port}: {(error.strerror or str(error)).lower()}; choose"
            " another serve.host or serve.port (0 takes a free one)"
        ) from None
    listener.listen(CONNECTIONS)
    return listener


def url_of(host: str, listener: socket.socket) -> str:
    """Where others reach it: an address that means all of them is told as this machine's name."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    return f"http://{f'[{name}]' if ':' in name else name}:{listener.getsockname()[1]}"


if __name__ == "__main__":
    sys.exit(main())
