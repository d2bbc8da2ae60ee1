"""The server of `cm play`: a page and its requests, which no other page may make."""

import asyncio
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from flows.errors import UserError, printable
from flows.play.studio import Command, Studio

PAGE = Path(__file__).parent / "page"
NAMES = ("127.0.0.1", "localhost")
OWN_SITES = (None, "none", "same-origin")  # as browsers tell: asked by the page, or by the address bar
MAX_BYTES = 32 * 2**20  # of a request, whose pictures are in base64
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def make_app(studio: Studio) -> Starlette:
    """Return the page and its requests."""

    async def models(request: Request) -> Response:
        return JSONResponse({"models": await in_thread(studio.local_models), "max_bytes": MAX_BYTES})

    async def registered(request: Request) -> Response:
        return JSONResponse({"models": await in_thread(studio.registered_models)})

    async def model(request: Request) -> Response:
        return JSONResponse(await in_thread(studio.describe, request.query_params.get("name", "")))

    async def picture(request: Request) -> Response:
        return JSONResponse(await in_thread(studio.read, await read_command(request)))

    async def draw(request: Request) -> Response:
        return JSONResponse(await in_thread(studio.draw, await read_command(request)))

    return Starlette(
        routes=[
            Route("/models", models),
            Route("/registered", registered),
            Route("/model", model),
            Route("/picture", picture, methods=["POST"]),
            Route("/draw", draw, methods=["POST"]),
            Mount("/", StaticFiles(directory=PAGE, html=True)),
        ],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=refuse_other_pages)],
        exception_handlers={
            UserError: lambda request, error: complaint(400, str(error)),
            HTTPException: lambda request, error: complaint(error.status_code, error.detail),
            Exception: broken,
        },
    )


async def refuse_other_pages(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Answer the page alone: no website in the same browser, not even by a name that resolves to this machine."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if host.partition(":")[0] not in NAMES:  # any port: it may be forwarded from another machine
        return complaint(403, f"asked as {host}; the page is served as {' or '.join(NAMES)} alone")
    if origin not in (None, f"http://{host}") or request.headers.get("sec-fetch-site") not in OWN_SITES:
        return complaint(403, f"asked by {origin or 'another website'}; only the page itself may ask")
    response = await call_next(request)
    response.headers.update(HEADERS)
    return response


def make_server(app: Starlette) -> uvicorn.Server:
    """Return a server that ends at once, and leaves the terminal to `broken`."""
    quiet = uvicorn.Config(
        app, log_level="critical", access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=0
    )
    return uvicorn.Server(quiet)


async def read_command(request: Request) -> Command:
    """Return the body as a command. Raises UserError if it is too large, or none."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BYTES:
            raise HTTPException(413, f"a request may have {MAX_BYTES >> 20} MiB, pictures included")
    try:
        return Command.model_validate_json(bytes(body))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise UserError(f"{'.'.join(map(str, first['loc'])) or 'request'}: {first['msg']}") from error


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a thread of its own; unlike those of a pool, it does not hold up the exit."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def settle(method: Callable[[Any], None], value: Any) -> None:
        if not future.done():  # else the request was cancelled
            method(value)

    def work() -> None:
        try:
            outcome = partial(settle, future.set_result, function(*arguments))
        except Exception as error:
            outcome = partial(settle, future.set_exception, error)
        with suppress(RuntimeError):  # the server has ended meanwhile
            loop.call_soon_threadsafe(outcome)

    Thread(target=work, daemon=True).start()
    return await future


def complaint(status: int, reason: str) -> Response:
    """Return one line for the page to show."""
    return JSONResponse({"error": printable(reason)}, status, headers=HEADERS)


def broken(request: Request, error: Exception) -> Response:
    """Report a fault of ours in the terminal, and to the page that there was one."""
    traceback.print_exception(error, file=sys.stderr)
    return complaint(500, f"{type(error).__name__}; the terminal of cm play has the details")
