"""The commands of `inferctl`: parse, call, print. Every failure is one sentence on stderr and an exit code."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from google.protobuf import json_format
from google.protobuf.message import Message
from rich.console import Console

from inference_runtime import __version__
from inference_runtime.cli.chat import ChatOptions, answer, converse
from inference_runtime.cli.cluster_file import Located, default_state_dir, locate
from inference_runtime.cli.local import Counts
from inference_runtime.cli.screen import table
from inference_runtime.cli.up import UpOptions, run_up
from inference_runtime.client import InferenceClient
from inference_runtime.deployment import load_project
from inference_runtime.errors import BadRequest, InferenceError
from inference_runtime.settings import environment
from inference_runtime.v1 import common_pb2, deployment_pb2

__all__ = ["main"]

#: Seconds that `apply --wait` waits for each deployment.
APPLY_WAIT_S = 300.0

T = TypeVar("T")

_etcd = click.option("--etcd", envvar="INFERENCE_ETCD", default="", metavar="HOST:PORT", help="Members of the cluster's etcd.")
_state_dir = click.option(
    "--state-dir", type=click.Path(path_type=Path, file_okay=False), help="State directory of the `up` to speak to."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="inferctl")
def cli() -> None:
    """Start a cluster on this machine, deploy models to a cluster, look at it, talk to it."""


@cli.command()
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="HTTP port; 0 picks a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address of the HTTP door.")
@click.option("--state-dir", type=click.Path(path_type=Path, file_okay=False), help="Data and logs.  [default: .inference]")
@click.option("--ready-file", type=click.Path(path_type=Path, dir_okay=False), help="Gets addresses and process ids as JSON.")
@click.option("--engines", type=click.IntRange(1, 64), default=1, show_default=True, help="Number of engines.")
@click.option("--singletons", type=click.IntRange(1, 9), default=1, show_default=True, help="Candidates of each singleton.")
@click.option("--gateways", type=click.IntRange(1, 16), default=1, show_default=True, help="Number of gateways.")
@click.option("--workers", type=click.IntRange(1, 256), default=1, show_default=True, help="Processes of each gateway.")
@click.option("-f", "--file", "project", type=click.Path(path_type=Path), help="Project file; without one, `demo` is deployed.")
@click.option("--etcd", envvar="INFERENCE_ETCD", default="", metavar="HOST:PORT", help="Use this etcd and start none.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Of every service.  [default: info]")
def up(
    port: int,
    host: str,
    state_dir: Path | None,
    ready_file: Path | None,
    engines: int,
    singletons: int,
    gateways: int,
    workers: int,
    project: Path | None,
    etcd: str,
    log_level: str | None,
) -> None:
    """Serve on this machine: etcd, coordinator, deployment manager, metrics, engines, gateways. Ctrl-C stops all."""
    options = UpOptions(
        state_dir=state_dir or default_state_dir(),
        host=host,
        port=port,
        ready_file=ready_file,
        counts=Counts(engines, singletons, gateways),
        workers=workers,
        project=project,
        etcd=tuple(part.strip() for part in etcd.split(",") if part.strip()),
        log_level=log_level or "",
    )
    asyncio.run(run_up(options, Console()))


@cli.command()
@click.option("-f", "--file", "project", type=click.Path(path_type=Path), required=True, help="Project file.")
@click.option("--wait", is_flag=True, help="Return once the deployments serve.")
@_etcd
@_state_dir
def apply(project: Path, wait: bool, etcd: str, state_dir: Path | None) -> None:
    """Create or change the deployments of a project file."""
    specs = load_project(project).deployment

    async def work(client: InferenceClient) -> None:
        for spec in specs:
            response = await client.apply(spec)
            what = f"applied, generation {response.deployment.generation}" if response.changed else "unchanged"
            click.echo(f"deployment {spec.name}: {what}")
        for spec in specs if wait else ():
            await client.wait_serving(spec.name, APPLY_WAIT_S)
            click.echo(f"deployment {spec.name}: serving")

    _with_client(locate(etcd, state_dir), work)


@cli.command()
@click.argument("name")
@_etcd
@_state_dir
def delete(name: str, etcd: str, state_dir: Path | None) -> None:
    """Drain and remove the deployment NAME."""
    _with_client(locate(etcd, state_dir), lambda client: client.delete(name))
    click.echo(f"deployment {name}: deleted")


@cli.command()
@click.argument("kind", type=click.Choice(["deployments", "engines", "replicas", "leaders"]))
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@_etcd
@_state_dir
def get(kind: str, output: str, etcd: str, state_dir: Path | None) -> None:
    """Show deployments, engines, replicas or leaders."""
    read, columns = _KINDS[kind]
    found = _with_client(locate(etcd, state_dir), read)
    if output == "json":
        click.echo(json.dumps([document for document, _ in found], indent=1))
    elif found:
        # As wide as its content when piped: a script cuts columns, not we.
        console = Console(width=None if sys.stdout.isatty() else 400)
        console.print(table(columns, [row for _, row in found]))
    else:
        click.echo(f"no {kind}")


@cli.command()
@click.argument("deployment")
@click.option("--once", metavar="TEXT", help="Ask this, print the answer, leave.")
@click.option("--system", metavar="TEXT", help="A system message before everything else.")
@click.option("--max-tokens", type=click.IntRange(1), help="Largest number of tokens of an answer.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 is greedy.")
@click.option("--seed", type=int, help="Makes an answer repeat.")
@click.option("--http", "address", default="", metavar="HOST:PORT", help="Gateway to talk to; else that of the running `up`.")
@_etcd
@_state_dir
def chat(
    deployment: str,
    once: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    address: str,
    etcd: str,
    state_dir: Path | None,
) -> None:
    """Talk to DEPLOYMENT. Ctrl-C stops an answer, Ctrl-D leaves."""
    http_address = (address or locate(etcd, state_dir).http).removeprefix("http://").rstrip("/")
    if not http_address:
        raise BadRequest("this cluster's gateway is not known from etcd; name it with --http host:port")
    options = ChatOptions(
        http_address,
        deployment,
        api_key=environment().get("INFERENCE_API_KEY", ""),
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        messages=[{"role": "system", "content": system}] if system else [],
    )
    if once is not None:
        answer(options, once, sys.stdout)
    else:
        converse(options, sys.stdout)


# --- reading a cluster -----------------------------------------------------------------------------------------------

_Found = list[tuple[Mapping[str, Any], Sequence[str]]]


def _name(enum: Any, value: int, prefix: str) -> str:
    return str(enum.Name(value)).removeprefix(prefix).lower()


def _document(message: Message) -> dict[str, Any]:
    return json_format.MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


async def _deployments(client: InferenceClient) -> _Found:
    found: _Found = []
    for d in await client.deployments():
        state = _name(deployment_pb2.DeploymentState, d.status.state, "DEPLOYMENT_STATE_")
        ready = f"{d.status.ready_replicas}/{d.spec.replicas}"
        found.append((_document(d), (d.spec.name, d.spec.model, d.runtime, state, ready, str(d.generation), d.status.reason)))
    return found


async def _engines(client: InferenceClient) -> _Found:
    found: _Found = []
    for e in await client.engines():
        state = _name(common_pb2.EngineState, e.state, "ENGINE_STATE_")
        devices = ", ".join(a.name for a in e.node.accelerators) or f"{e.node.cpu_cores} CPU cores"
        found.append((_document(e), (e.id, e.address, str(e.pid), state, e.node.hostname, devices, ", ".join(e.runtimes))))
    return found


async def _replicas(client: InferenceClient) -> _Found:
    found: _Found = []
    for r, load in await client.replicas():
        state = _name(common_pb2.ReplicaState, r.state, "REPLICA_STATE_")
        busy = (str(load.running), str(load.queued))
        row = (r.deployment, r.id, r.engine_id, state, *busy, str(r.restarts), r.reason)
        found.append(({"replica": _document(r), "load": _document(load)}, row))
    return found


async def _leaders(client: InferenceClient) -> _Found:
    found: _Found = []
    for role, leader in (await client.leaders()).items():
        if leader is None:
            found.append(({"role": role}, (role, "nobody", "", "", "")))
        else:
            term = str(leader.token.revision)
            found.append((_document(leader), (role, leader.candidate_id, leader.address, str(leader.pid), term)))
    return found


_KINDS: dict[str, tuple[Callable[[InferenceClient], Coroutine[Any, Any, _Found]], Sequence[str]]] = {
    "deployments": (_deployments, ("NAME", "MODEL", "RUNTIME", "STATE", "READY", "GENERATION", "REASON")),
    "engines": (_engines, ("ID", "ADDRESS", "PID", "STATE", "HOST", "DEVICES", "RUNTIMES")),
    "replicas": (_replicas, ("DEPLOYMENT", "ID", "ENGINE", "STATE", "RUNNING", "QUEUED", "RESTARTS", "REASON")),
    "leaders": (_leaders, ("ROLE", "CANDIDATE", "ADDRESS", "PID", "TERM")),
}


def _with_client(where: Located, work: Callable[[InferenceClient], Coroutine[Any, Any, T]]) -> T:
    async def run() -> T:
        async with InferenceClient(etcd=where.etcd) as client:
            return await work(client)

    return asyncio.run(run())


# --- the program -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Run a command. Exit code 0; 1 when it failed; 2 when what was asked for is wrong; 130 after Ctrl-C."""
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as err:
        err.show()
        code = err.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except InferenceError as err:
        click.echo(f"inferctl: {err.message}", err=True)
        code = 2 if isinstance(err, BadRequest) else 1
    except BrokenPipeError:
        code = 1  # the reader of our output left
    except OSError as err:
        click.echo(f"inferctl: {err.filename or 'the system'}: {err.strerror or err}", err=True)
        code = 1
    else:
        return
    sys.exit(code)
