"""What `inferctl` shows: tables, and the state line of each process while `up` runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

from inference_runtime.cli.processes import Process

__all__ = ["Screen", "table"]

COLOURS = {
    "serving": "green",
    "leading": "green",
    "standby": "cyan",
    "waiting": "yellow",
    "starting": "yellow",
    "draining": "yellow",
}


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, wrap: bool = True) -> Table:
    """A table without frames, that stays readable when it is piped. Without `wrap`, what is too long is cut."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold" if wrap else "ellipsis", no_wrap=not wrap)
    for row in rows:
        made.add_row(*row)
    return made


class Screen:
    """One line for each process: drawn in place on a terminal, printed when it changes elsewhere. Use as a context manager."""

    def __init__(self, console: Console, processes: Mapping[str, Process]) -> None:
        self._console, self._processes = console, processes
        self._live: Live | None = None
        self._shown: dict[str, tuple[int, str]] = {}

    def update(self, states: Mapping[str, str]) -> bool:
        """Show these states; whether a state or a process id changed."""
        now = {name: (process.pid, states.get(name, "stopped")) for name, process in self._processes.items()}
        changed = {name: entry for name, entry in now.items() if self._shown.get(name) != entry}
        self._shown = now
        if not changed:
            return False
        if self._console.is_terminal:
            rows = [self._row(name, coloured=True) for name in now]
            drawn = table(("PROCESS", "PID", "ADDRESS", "STATE", "WHAT"), rows, wrap=False)
            if self._live is None:
                self._live = Live(drawn, console=self._console, auto_refresh=False)
                self._live.start()
            self._live.update(drawn, refresh=True)
        else:
            for name in changed:
                process, pid, address, state, what = self._row(name, coloured=False)
                self._console.print(f"{process:21s} {pid:>8s}  {address:21s}  {state:10s}  {what}", soft_wrap=True)
        return True

    def close(self) -> None:
        """Leave the last picture standing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _row(self, name: str, *, coloured: bool) -> tuple[str, str, str, str, str]:
        pid, state = self._shown[name]
        spec = self._processes[name].spec
        shown = f"[{COLOURS.get(state, 'red')}]{state}[/]" if coloured else state
        return name, str(pid), spec.door, shown, spec.what
