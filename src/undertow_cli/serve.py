"""`undertow serve`: a small OpenAI-compatible HTTP server, and a page that shows what the model does inside."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from undertow_cli.console import Device, Memory, Run, errors, out, quiet

LOCAL = {
    "127.0.0.1": ("127.0.0.1", "localhost"),
    "localhost": ("127.0.0.1", "localhost"),
    "::1": ("[::1]", "localhost"),
}


def serve(
    folder: Run,
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0: every one of this machine's.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    key_env: Annotated[
        str | None, typer.Option("--api-key-env", metavar="NAME", help="The environment variable that holds the key.")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option("--api-key-file", metavar="FILE", help="The file whose first line is the key.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of a text at most.")] = 1024,
    max_queue: Annotated[int, typer.Option(min=1, help="Texts that may wait for their turn.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Texts that are written at once.")] = 8,
    memory: Memory = "run",
    device: Device = "auto",
) -> None:
    """Serve a trained model over HTTP: OpenAI's completions and chat, and a page at /."""
    try:
        import uvicorn

        from undertow.serve import api
    except ImportError as error:
        if error.name not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise ValueError(f"undertow serve needs {error.name}: pip install 'undertow[serve]'") from None
    from undertow.serve.engine import Limits
    from undertow.training import run

    key = read_key(key_env, key_file)
    limits = Limits(max_tokens, max_queue, batch)
    with listening(host, port) as listener:  # before the model loads: a port that is taken is known at once
        quiet()
        loaded = run.load(folder, device, memory)
        if key is None and host not in LOCAL:
            errors.print(f"warning: --host {host} without an API key: whoever reaches this machine may use the model")
        name = Path(folder).resolve().name
        app = api.build(loaded.model, loaded.format, limits, name, key, LOCAL.get(host))
        shown = f"[{host}]" if ":" in host else host
        out.print(f"{name} at http://{shown}:{listener.getsockname()[1]} (Ctrl-C stops)", highlight=False)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)

        class Server(uvicorn.Server):
            async def shutdown(self, sockets=None):
                await asyncio.to_thread(app.state.engine.close)  # texts in progress end now, each with an error
                await super().shutdown(sockets)

        Server(config).run(sockets=[listener])  # raises again the signal that ended it


def listening(host: str, port: int):
    """A socket that listens there. Raises OSError with one line that says where."""
    import socket

    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(f"--host {host} --port {port}: {error.strerror or error}") from None


def read_key(variable: str | None, file: Path | None) -> str | None:
    """The API key. Raises ValueError (both are given, or there is none), OSError (no such file)."""
    import os

    if variable is None and file is None:
        return None
    if variable is not None and file is not None:
        raise ValueError("--api-key-env and --api-key-file: only one of them")
    if variable is not None:
        where, text = f"--api-key-env {variable}", os.environ.get(variable, "")
    else:
        assert file is not None
        where, text = f"--api-key-file {file}", file.read_text(encoding="utf-8").partition("\n")[0]
    key = text.strip()
    if not key or not key.isascii() or any(c.isspace() for c in key):
        raise ValueError(f"{where}: holds no key (ASCII without spaces)")
    return key
