"""Whether the other end of a session still hears us. Pure: the caller tells what it sends and hears, four times a second.

A process that stands still keeps its connections: nothing but the absence of answers tells. While something runs on a session and
no message comes, a ping asks for one. An engine answers it from its event loop at once, however long its steps are; one that has
not for half a second is silent until it says anything at all. Nothing is sent on a session on which nothing runs.
"""

from __future__ import annotations

__all__ = ["SILENT_SWEEPS", "Ear"]

#: Sweeps after the one in which the ping left until its answer is overdue. Counted and not timed: a gateway that itself stood
#: still has read nothing in that time either, and must not blame its engines.
SILENT_SWEEPS = 2


class Ear:
    """The state of one session. `heard` is set with every message: the only thing a message costs."""

    __slots__ = ("_asked", "heard", "silence")

    def __init__(self) -> None:
        self.heard = False
        #: Sweeps since the one in which the ping left that was not answered yet; 0 where there is none.
        self.silence = 0
        self._asked = False

    @property
    def silent(self) -> bool:
        """A ping was not answered in time, and nothing else came."""
        return self.silence >= SILENT_SWEEPS

    def sweep(self, *, expecting: bool) -> bool:
        """Take notice of the last quarter of a second. Returns whether to send a ping now.

        Args:
            expecting: Something runs on the session.
        """
        if self.heard or not (expecting or self._asked):
            self.reset()
            return False
        if not self._asked:
            self._asked = True
            return True
        self.silence += 1
        return False

    def reset(self) -> None:
        """All is well, or nothing is known: a session begins or ends."""
        self.heard = self._asked = False
        self.silence = 0
