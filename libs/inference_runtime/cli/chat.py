"""`inferctl chat`: a conversation in the terminal, over the gateway's OpenAI-compatible door. Standard library only."""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import TextIO

from inference_runtime.errors import BadRequest, InferenceError, NetworkError, ServerError

__all__ = ["ChatOptions", "converse", "stream_answer"]

#: Seconds to wait for the next piece of an answer.
SILENCE_S = 120.0


@dataclass(slots=True)
class ChatOptions:
    """Whom to talk to, and how."""

    address: str
    deployment: str
    api_key: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    messages: list[dict[str, str]] = field(default_factory=list)


def stream_answer(options: ChatOptions) -> Generator[str, None, None]:
    """The pieces of the answer to `options.messages`, as they come. Closing the iterator stops the generation.

    Raises:
        InferenceError: The gateway refused, the stream broke, or it ended without saying that it is complete.
    """
    body = {"model": options.deployment, "messages": options.messages, "stream": True}
    limits = {"max_tokens": options.max_tokens, "temperature": options.temperature, "seed": options.seed}
    body |= {key: value for key, value in limits.items() if value is not None}
    headers = {"content-type": "application/json"}
    if options.api_key:
        headers["authorization"] = f"Bearer {options.api_key}"
    connection = http.client.HTTPConnection(options.address, timeout=SILENCE_S)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise _refusal(response.status, response.read())
        yield from _deltas(response)
    except (OSError, http.client.HTTPException) as err:
        raise NetworkError(f"the gateway at {options.address} broke off: {err or type(err).__name__}") from err
    finally:
        connection.close()


def _deltas(response: http.client.HTTPResponse) -> Iterator[str]:
    for raw in response:
        if not raw.startswith(b"data:"):
            continue  # blank lines, and comments that keep the connection awake
        data = raw[5:].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise ServerError(str(event["error"].get("message", "the answer failed")))
        for choice in event["choices"]:
            if choice["delta"].get("content"):
                yield choice["delta"]["content"]
    raise NetworkError("the answer ended without an end mark: it may be cut")


def _refusal(status: int, body: bytes) -> InferenceError:
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"the gateway answered {status}"
    return BadRequest(message) if status < 500 else ServerError(message)


def answer(options: ChatOptions, text: str, out: TextIO) -> None:
    """Ask one thing, write the answer as it comes, remember both. Ctrl-C stops the answer and keeps what was said."""
    options.messages.append({"role": "user", "content": text})
    said: list[str] = []
    try:
        with contextlib.closing(stream_answer(options)) as pieces:
            for piece in pieces:
                said.append(piece)
                out.write(piece)
                out.flush()
        out.write("\n")
    except KeyboardInterrupt:
        out.write(" …\n")
    except InferenceError:
        if said:
            out.write("\n")
        options.messages.pop()
        raise
    options.messages.append({"role": "assistant", "content": "".join(said)})


def converse(options: ChatOptions, out: TextIO) -> None:
    """Talk until Ctrl-D. Ctrl-C stops an answer; at the prompt it clears the line."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it gives input() a history and an editable line
    if sys.stdin.isatty():
        out.write(f"{options.deployment} at {options.address} · Ctrl-C stops an answer, Ctrl-D leaves\n")
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            out.write("\n" if sys.stdin.isatty() else "")
            return
        except KeyboardInterrupt:
            out.write("\n")
            continue
        if not text:
            continue
        try:
            answer(options, text, out)
        except InferenceError as err:
            out.write(f"error: {err.message}\n")
