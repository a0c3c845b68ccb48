"""`inferctl up`: a whole cluster in the foreground, watched and restarted until somebody stops it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import shutil
import signal
import sys
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

import inference_runtime
from inference_runtime.cli.cluster_file import RUNTIME_FILE, default_state_dir, lock_state_dir, write_atomically
from inference_runtime.cli.local import Counts, LocalCluster, http_get
from inference_runtime.cli.processes import RestartPolicy
from inference_runtime.cli.screen import Screen
from inference_runtime.client import InferenceClient
from inference_runtime.coordination import EtcdClient
from inference_runtime.deployment import DeploymentSpec, load_project
from inference_runtime.errors import ServerError, Timeout

__all__ = ["UpOptions", "run_up"]

DEMO = "demo"
#: Seconds that the processes and the deployments get to serve.
START_TIMEOUT_S = 60.0
#: Seconds between two looks for processes that died.
WATCH_S = 0.1
#: Seconds between two looks at what every process is doing.
OBSERVE_S = 1.0
#: Seconds between two looks at the models that a gateway offers, while starting.
MODELS_POLL_S = 0.05
#: Services whose settings take a log level.
SERVICES = ("coordinator", "deployment_manager", "metrics", "engine", "gateway")


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What `inferctl up` was asked for."""

    state_dir: Path
    host: str = "127.0.0.1"
    port: int = 8080
    ready_file: Path | None = None
    counts: Counts = field(default_factory=Counts)
    workers: int = 1
    project: Path | None = None
    etcd: tuple[str, ...] = ()
    log_level: str = ""


def demo_deployment() -> tuple[DeploymentSpec, str]:
    """The deployment that answers without any file, and why it is not the real one, if so."""
    weights = Path(inference_runtime.__file__).with_name("demo_model") / "model.safetensors"
    if importlib.util.find_spec("torch") is None:
        why = "torch is not installed (pip install 'inference-runtime[torch]')"
    elif not weights.is_file():
        why = f"{weights} is missing"
    else:
        return DeploymentSpec(name=DEMO, model=DEMO, runtime="torch"), ""
    return DeploymentSpec(name=DEMO, model="scripted", runtime="scripted"), why


async def run_up(options: UpOptions, console: Console) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP; then stop everything in order. A second signal stops it at once.

    Raises:
        InferenceError: Something is wrong that a restart does not heal; one sentence. No process is left.
    """
    specs: Sequence[DeploymentSpec]
    if options.project is not None:
        specs = load_project(options.project).deployment
    else:
        demo, why = demo_deployment()
        specs = [demo]
        if why:
            console.print(f"note: {why}, so demo answers with scripted words", soft_wrap=True, markup=False)
    with lock_state_dir(options.state_dir):
        level = {s: {f"INFERENCE_{s.upper()}__TELEMETRY__LOG_LEVEL": options.log_level} for s in SERVICES if options.log_level}
        cluster = LocalCluster(
            options.state_dir,
            host=options.host,
            http_port=options.port,
            counts=options.counts,
            etcd=options.etcd,
            gateway_workers=options.workers,
            extra=level,
        )
        stopping, hurry = asyncio.Event(), list[bool]()
        _on_signals(stopping, hurry, console)
        try:
            await _first_of(stopping.wait(), _serve(cluster, specs, options, console))
        finally:
            for path in (cluster.state_dir / RUNTIME_FILE, options.ready_file):
                if path is not None:
                    path.unlink(missing_ok=True)
            await asyncio.to_thread(cluster.stop, hurry=hurry)  # in a thread, so that the loop hears a second signal


def _on_signals(stopping: asyncio.Event, hurry: list[bool], console: Console) -> None:
    """The first signal sets `stopping`, each later one fills `hurry`. For the rest of the program."""

    def heard() -> None:
        if stopping.is_set():
            hurry.append(True)
        else:
            console.print("stopping in order; once more stops at once")
            stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, heard)


async def _first_of(*works: Coroutine[Any, Any, Any]) -> None:
    """Run all until one ends; cancel the others, wait for them, and raise what the first one raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def _serve(cluster: LocalCluster, specs: Sequence[DeploymentSpec], options: UpOptions, console: Console) -> None:
    """Start, deploy, say so, then watch. Ends only by failing or by being cancelled."""
    began = time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        await cluster.start_clean(START_TIMEOUT_S)
        client = await cluster.connect(stack, START_TIMEOUT_S)
        await _first_of(_fail_when_one_ends(cluster), _deploy(cluster, client, specs))
        _announce(cluster, specs, console, time.monotonic() - began)
        screen = Screen(console, cluster.processes)
        stack.callback(screen.close)
        screen.update((await cluster.observe(client)).states)
        _publish(cluster, options)
        await _first_of(_restart(cluster, options), _show(cluster, client, screen))


async def _fail_when_one_ends(cluster: LocalCluster) -> None:
    """Never returns: raises once a process has ended. While starting, a death is a fault to show, not one to repair."""
    while True:
        cluster.raise_if_ended()
        await asyncio.sleep(WATCH_S)


async def _deploy(cluster: LocalCluster, client: EtcdClient, specs: Sequence[DeploymentSpec]) -> None:
    """Apply the deployments; return once they, every process and every gateway serve."""
    async with InferenceClient(etcd=cluster.etcd_endpoints) as operator:
        for spec in specs:
            await operator.apply(spec)
        for spec in specs:
            await operator.wait_serving(spec.name, START_TIMEOUT_S)
    await cluster.wait_ready(client, START_TIMEOUT_S)
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            for url in cluster.http_urls:
                await _offered(url.removeprefix("http://"), specs)
    except TimeoutError as err:
        raise Timeout(f"a gateway does not offer the deployments after {START_TIMEOUT_S:g} s (logs: {cluster.logs})") from err


async def _offered(address: str, specs: Sequence[DeploymentSpec]) -> None:
    """Return once this gateway can serve and knows the deployments. One that wants a key is not asked which."""
    names = [f'"{spec.name}"'.encode() for spec in specs if spec.replicas]
    while names:
        ready, _ = await http_get(address, "/readyz")
        status, body = await http_get(address, "/v1/models")
        if ready == 200 and (status == 401 or (status == 200 and all(name in body for name in names))):
            return
        await asyncio.sleep(MODELS_POLL_S)


def _announce(cluster: LocalCluster, specs: Sequence[DeploymentSpec], console: Console, took_s: float) -> None:
    name = specs[0].name if specs else DEMO
    url = cluster.http_urls[0]
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "What is inference-runtime?"}}]}}'
    etcd = ", ".join(cluster.etcd_endpoints)
    for line in (
        f"serving after {took_s:.1f} s",
        f"  http  {', '.join(cluster.http_urls)}",
        f"  grpc  {', '.join(cluster.grpc_addresses)}",
        f"  etcd  {etcd}",
        f"  logs  {cluster.logs}",
        f"  try   curl -s {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'",
        f"        {_program()} chat {name}{_where(cluster.state_dir)}",
        "",
    ):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _program() -> str:
    """This program as a person would type it here: by name where the shell finds it, else by its path."""
    script = Path(sys.argv[0])
    found = shutil.which(script.name)
    if script.name != "inferctl" or (found and Path(found).resolve() == script.resolve()):
        return "inferctl"
    return os.path.relpath(script)


def _where(state_dir: Path) -> str:
    return "" if state_dir.resolve() == default_state_dir().resolve() else f" --state-dir {state_dir}"


def _publish(cluster: LocalCluster, options: UpOptions) -> None:
    """Tell scripts and other commands where everything is."""
    document = cluster.description()
    write_atomically(cluster.state_dir / RUNTIME_FILE, {**document, "pid": os.getpid()})
    if options.ready_file is not None:
        write_atomically(options.ready_file, document)


async def _restart(cluster: LocalCluster, options: UpOptions) -> None:
    """Start again what dies. Never returns.

    Raises:
        ServerError: One process died too often.
    """
    policies = {name: RestartPolicy() for name in cluster.processes}
    due: dict[str, float] = {}
    while True:
        now = time.monotonic()
        for name, process in cluster.processes.items():
            if process.running:
                continue
            if name not in due:
                pause_s = policies[name].pause_s(now)
                if pause_s is None:
                    often = f"{policies[name].limit + 1} times within {policies[name].window_s:g} s"
                    raise ServerError(f"gave up: {name} ended {often}; {process.ended_sentence()}")
                due[name] = now + pause_s
            elif now >= due[name]:
                del due[name]
                process.start()
                _publish(cluster, options)
        await asyncio.sleep(WATCH_S)


async def _show(cluster: LocalCluster, client: EtcdClient, screen: Screen) -> None:
    """Keep the state lines true. Never returns."""
    while True:
        await asyncio.sleep(OBSERVE_S)
        screen.update((await cluster.observe(client)).states)
