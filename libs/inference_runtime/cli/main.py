"""The commands of `inferctl`: parse, call, print. Every failure is one sentence on stderr and an exit code.

Each command imports what it needs when it runs: `chat` starts without gRPC and without the control plane's messages.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from inference_runtime import __version__
from inference_runtime.cli.cluster_file import default_state_dir, locate
from inference_runtime.cli.output import FORMATS, render
from inference_runtime.errors import BadRequest, InferenceError

if TYPE_CHECKING:
    from inference_runtime.client import InferenceClient

__all__ = ["main"]

#: Seconds that `apply --wait` waits for each deployment.
APPLY_WAIT_S = 300.0
#: Seconds that `drain --wait` waits.
DRAIN_WAIT_S = 900.0

_etcd = click.option("--etcd", envvar="INFERENCE_ETCD", default="", metavar="HOST:PORT", help="Members of the cluster's etcd.")
_state_dir = click.option(
    "--state-dir", type=click.Path(path_type=Path, file_okay=False), help="State directory of the `up` to speak to."
)

_output = click.option("-o", "--output", type=click.Choice(FORMATS), default="table", show_default=True)


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
    from rich.console import Console

    from inference_runtime.cli.local import Counts
    from inference_runtime.cli.up import UpOptions, run_up

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
    from inference_runtime.cli.views import with_client
    from inference_runtime.deployment import load_project

    specs = load_project(project).deployment

    async def work(client: InferenceClient) -> None:
        for spec in specs:
            response = await client.apply(spec)
            what = f"applied, generation {response.deployment.generation}" if response.changed else "unchanged"
            click.echo(f"deployment {spec.name}: {what}")
        for spec in specs if wait else ():
            await client.wait_serving(spec.name, APPLY_WAIT_S)
            click.echo(f"deployment {spec.name}: serving")

    with_client(locate(etcd, state_dir), work)


@cli.command()
@click.argument("name")
@_etcd
@_state_dir
def delete(name: str, etcd: str, state_dir: Path | None) -> None:
    """Drain and remove the deployment NAME."""
    from inference_runtime.cli.views import with_client

    with_client(locate(etcd, state_dir), lambda client: client.delete(name))
    click.echo(f"deployment {name}: deleted")


@cli.command()
@click.argument("engine")
@click.option("--undo", is_flag=True, help="Put it back into service.")
@click.option("--wait", is_flag=True, help="Return once nothing runs there any more.")
@_etcd
@_state_dir
def drain(engine: str, undo: bool, wait: bool, etcd: str, state_dir: Path | None) -> None:
    """Take ENGINE out of service without ending it.

    It takes nothing new, its replicas move to other engines, and what has not ended within its drain time-out goes on elsewhere.
    """
    from inference_runtime.cli.views import with_client

    async def work(client: InferenceClient) -> None:
        left = await client.drain_engine(engine, undo=undo)
        click.echo(f"engine {engine}: {'back in service' if undo else f'drains, {left} requests run'}")
        if wait and not undo:
            await client.wait_drained(engine, DRAIN_WAIT_S)
            click.echo(f"engine {engine}: drained")

    with_client(locate(etcd, state_dir), work)


@cli.command()
@click.argument("kind", type=click.Choice(["deployments", "engines", "replicas", "leaders", "coordinator"]))
@_output
@_etcd
@_state_dir
def get(kind: str, output: str, etcd: str, state_dir: Path | None) -> None:
    """Show deployments, engines, replicas, leaders, or how the coordinator is doing."""
    from rich.console import Console

    from inference_runtime.cli.screen import table
    from inference_runtime.cli.views import KINDS, with_client

    read, columns = KINDS[kind]
    found = with_client(locate(etcd, state_dir), read)
    if output != "table":
        click.echo(render([document for document, _ in found], output))
    elif found:
        # As wide as its content when piped: a script cuts columns, not we.
        console = Console(width=None if sys.stdout.isatty() else 400)
        console.print(table(columns, [row for _, row in found]))
    else:
        click.echo(f"no {kind}")


@cli.command()
@click.argument("kind", type=click.Choice(["deployment", "engine", "replica"]))
@click.argument("name")
@_output
@_etcd
@_state_dir
def describe(kind: str, name: str, output: str, etcd: str, state_dir: Path | None) -> None:
    """Show all that is known of one deployment, engine or replica: its state, why, and its replicas."""
    from rich.console import Console
    from rich.text import Text

    from inference_runtime.cli.describe import DESCRIBERS, REPLICA_COLUMNS
    from inference_runtime.cli.screen import table
    from inference_runtime.cli.views import with_client

    seen = with_client(locate(etcd, state_dir), lambda client: DESCRIBERS[kind](client, name))
    if output != "table":
        click.echo(render(seen.document, output))
        return
    for label, value in seen.facts:
        first, *others = value.splitlines()
        click.echo(f"{label + ':':14s}{first}")
        for line in others:
            click.echo(f"{'':14s}{line}")
    if seen.replicas:
        console = Console(width=None if sys.stdout.isatty() else 400)
        console.print(Text(), table(REPLICA_COLUMNS, seen.replicas))


@cli.command()
@click.argument("name")
@click.option("--replicas", type=click.IntRange(0, 1000), required=True, help="Number of copies; 0 keeps it without any.")
@_etcd
@_state_dir
def scale(name: str, replicas: int, etcd: str, state_dir: Path | None) -> None:
    """Give the deployment NAME another number of replicas. Nothing else of it changes, also when others change it meanwhile."""
    from inference_runtime.cli.scale import scale as set_replicas
    from inference_runtime.cli.views import with_client

    done = with_client(locate(etcd, state_dir), lambda client: set_replicas(client, name, replicas))
    what = f"{done.before} -> {replicas} replicas, generation {done.generation}" if done.changed else "unchanged"
    click.echo(f"deployment {name}: {what}")


@cli.group()
def rollout() -> None:
    """Follow what became of a change."""


@rollout.command("status")
@click.argument("name")
@click.option("--watch", is_flag=True, help="Say each change; return once it serves.")
@_etcd
@_state_dir
def rollout_status(name: str, watch: bool, etcd: str, state_dir: Path | None) -> None:
    """Show how far the latest generation of the deployment NAME has come."""
    from inference_runtime.cli.rollout import follow, sentence
    from inference_runtime.cli.views import with_client

    async def work(client: InferenceClient) -> None:
        if watch:
            await follow(client, name, APPLY_WAIT_S, lambda line: click.echo(f"deployment {name}: {line}"))
        else:
            click.echo(f"deployment {name}: {sentence(await client.deployment(name))}")

    with_client(locate(etcd, state_dir), work)


@cli.command()
@click.argument("service", default="")
@click.option("-f", "--follow", is_flag=True, help="Go on with each new line until Ctrl-C.")
@click.option("-n", "--lines", type=click.IntRange(0, 100_000), default=50, show_default=True, help="Last lines of each log.")
@_state_dir
def logs(service: str, follow: bool, lines: int, state_dir: Path | None) -> None:
    """Show the logs of an `up` on this machine: of all, of one SERVICE, or of one process (`gateway-2`)."""
    from inference_runtime.cli import logs as files
    from inference_runtime.cli.cluster_file import LOCAL_DIR, home_state_dir

    paths = files.find_logs([state_dir] if state_dir is not None else [LOCAL_DIR, home_state_dir()], service)

    def say(path: Path, line: str) -> None:
        click.echo(line if len(paths) == 1 else f"{path.stem}: {line}")

    read: dict[Path, int] = {}
    for path in paths:
        last, read[path] = files.tail(path, lines)
        for line in last:
            say(path, line)
    for _ in files.follow(paths, read, say) if follow else ():
        sys.stdout.flush()


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes `inferctl` in this SHELL."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None  # click knows all that are choices here
    click.echo(found(cli, {}, "inferctl", "_INFERCTL_COMPLETE").source())


@cli.command()
@click.argument("deployment")
@click.option("--once", metavar="TEXT", help="Ask this, print the answer, leave.")
@click.option("--system", metavar="TEXT", help="A system message before everything else.")
@click.option("--max-tokens", type=click.IntRange(1), help="Largest number of tokens of an answer.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 is greedy.")
@click.option("--seed", type=int, help="Makes an answer repeat.")
@click.option("--api-key", envvar="INFERENCE_API_KEY", default="", help="Better set INFERENCE_API_KEY: flags are seen by others.")
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
    api_key: str,
    address: str,
    etcd: str,
    state_dir: Path | None,
) -> None:
    """Talk to DEPLOYMENT. Ctrl-C stops an answer, Ctrl-D leaves."""
    from inference_runtime.cli.chat import ChatOptions, answer, converse

    http_address = (address or locate(etcd, state_dir).http).removeprefix("http://").rstrip("/")
    if not http_address:
        raise BadRequest("this cluster's gateway is not known from etcd; name it with --http host:port")
    options = ChatOptions(
        http_address,
        deployment,
        api_key=api_key,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        messages=[{"role": "system", "content": system}] if system else [],
    )
    if once is not None:
        answer(options, once, sys.stdout)
    else:
        converse(options, sys.stdout)


@cli.command("acknowledge-store")
@click.option("--allow-empty", is_flag=True, help="Also when it holds no deployment: that takes every route away.")
@_etcd
@_state_dir
def acknowledge_store(allow_empty: bool, etcd: str, state_dir: Path | None) -> None:
    """Follow the etcd that answers from now on, although it was wiped, replaced or restored from an older state."""
    from inference_runtime.cli.store import acknowledge
    from inference_runtime.coordination import EtcdClient

    async def work() -> str:
        async with EtcdClient(locate(etcd, state_dir).etcd) as client:
            done = await acknowledge(client, allow_empty=allow_empty)
        held = f"{done.deployments} deployments, {done.assignments} assignments, revision {done.revision}"
        return f"store {done.store_id[:8]} is followed from now on: {held}"

    click.echo(asyncio.run(work()))


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
