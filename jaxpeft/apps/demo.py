"""A local web page: drop an image, get captions or answers, and compare tuned runs with their frozen base.

    pip install 'jaxpeft[demo]'
    jaxpeft demo --workdir runs/mine runs/other        # then open the address that it prints

Loading and compiling the models takes a minute; the address is printed when the page is ready.

The server listens on this machine only and stores no images. `app` is an ordinary ASGI application.
"""

import argparse
import dataclasses
import errno
import functools
import os
import re
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jaxpeft.apps.generate import generate
from jaxpeft.inputs import images
from jaxpeft.models import loading
from jaxpeft.models.base import VisionLanguageModel
from jaxpeft.runtime import files, host, malloc, registry
from jaxpeft.tasks.base import Task
from jaxpeft.training import finished, setup
from jaxpeft.tree import Tree

PAGE = Path(__file__).with_name("demo.html")
MOST_BYTES = 32 << 20  # the most bytes of an image
HOSTS = ("127.0.0.1", "localhost")


@dataclasses.dataclass
class Writer:
    """A model on the page: a tuned run or a frozen base."""

    name: str
    model: VisionLanguageModel
    variables: Tree
    task: Task | None
    group: int  # equal for a frozen base and the runs tuned from it, which the page shows side by side

    @property
    def asks(self) -> bool:
        """Whether the model answers questions; otherwise it writes captions."""
        return self.task.asks if self.task else "vqa" in self.model.tasks


def load(workdirs: list[str], bases: list[str] = (), log=print, imports: Iterable[str] = ()) -> list[Writer]:
    """Load each frozen base, followed by the runs tuned from it, then other checkpoints.

    Raises ValueError for a checkpoint that cannot be loaded, and, before anything is loaded, for a workdir without a finished
    run.
    """
    given = {os.path.abspath(workdir): workdir for workdir in workdirs}  # a run given twice is loaded once
    groups = {}
    for path, workdir in given.items():
        groups.setdefault(_base_of(workdir), []).append(path)
    run_names, base_names = tails(given), tails([*(base for base, *_ in groups), *bases])

    writers = []
    for group, ((base, size, _), paths) in enumerate(groups.items()):
        tuned = []
        for path in paths:
            log(f"loading {given[path]} ...")
            model, variables, _, task = finished.load_run(given[path], imports)
            tuned.append(Writer(run_names[path], model, variables, task, group))
        log(f"loading {base}, the frozen base of {', '.join(given[path] for path in paths)} ...")
        model, params = loading.load(base, task=task.kind, image_size=size)
        shown = re.sub("@([0-9a-f]{8})[0-9a-f]{32}$", r"@\1", base_names[base])  # the usual short form of a commit
        name = f"{shown}, frozen" + (f", {size} pixels" if size else "")
        writers += [Writer(name, model, {"params": params}, task, group), *tuned]
    for group, base in enumerate(bases, len(groups)):
        log(f"loading {base} ...")
        model, params = loading.load(base)
        writers.append(Writer(base_names[base], model, {"params": params}, None, group))
    return writers


def _base_of(workdir: str) -> tuple[str, int | None, str]:
    """(base, image size, task) of a finished run; runs with equal values share a frozen base."""
    config, result = finished.read(workdir)
    with files.reading(workdir, "holds no jaxpeft run"):
        size = config.get("model", {}).get("image_size")
        return setup.pinned_base(config, result), size and int(size), str(config["task"])


def tails(paths: Iterable[str]) -> dict[str, str]:
    """Path -> its shortest unique end: for /a/mine, /b/mine and /b/new these are a/mine, b/mine and new."""
    parts = {path: Path(path).parts for path in paths}
    found = {}
    for path, mine in parts.items():
        ends = (mine[-n:] for n in range(1, len(mine) + 1))
        own = (end for end in ends if sum(other[-len(end) :] == end for other in parts.values()) == 1)
        found[path] = str(Path(*next(own, mine)))
    return found


def warm(writers: list[Writer], top: int = 3, log=print) -> None:
    """Compile the programs that the first requests need."""
    blank = np.zeros((64, 64, 3), np.uint8)
    for one in writers:
        log(f"compiling {one.name} ...")
        generate(one.model, one.variables, [blank], "-" if one.asks else None, batch_size=1, task=one.task, top=top)


def answers(writers: list[Writer], data: bytes, question: str, top: int = 3) -> list[dict]:
    """The name, group, texts and seconds of each fitting model: with a question those that answer, else those that caption."""
    image, rows = images.decode(data, name="that was sent"), []
    for one in writers:
        if one.asks == bool(question):
            began = time.perf_counter()
            (texts,) = generate(
                one.model, one.variables, [image], question or None, batch_size=1, task=one.task, top=top
            )
            seconds = time.perf_counter() - began
            rows.append({"name": one.name, "group": one.group, "texts": texts, "seconds": seconds})
    return rows


def app(writers: list[Writer]):
    """The ASGI application: the page at /, its models at /writers, and POST /write?question=...&top=3 with an image's bytes.

    Serves requests to this machine's own names only, and accepts images only from its own page or from programs.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.routing import Route

    one_at_a_time = threading.Lock()

    def locked(*args):
        with one_at_a_time:
            return answers(writers, *args)

    async def page(request):
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    async def offered(request):
        found = [{"name": one.name, "asks": one.asks} for one in writers]
        return JSONResponse({"writers": found, "most_bytes": MOST_BYTES})

    async def write(request):
        if not _is_ours(request):
            return JSONResponse({"error": "requests from pages of other sites are not allowed"}, status_code=403)
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > MOST_BYTES:
                return JSONResponse({"error": f"the image must have at most {MOST_BYTES >> 20} MB"}, status_code=413)
        try:
            top = int(request.query_params.get("top", 3))
            if not 1 <= top <= 10:
                raise ValueError(f"top is {top}; it must be between 1 and 10")
            question = request.query_params.get("question", "").strip()
            return JSONResponse(await run_in_threadpool(locked, bytes(data), question, top))
        except ValueError as error:
            return JSONResponse({"error": str(error)}, status_code=400)

    routes = [Route("/", page), Route("/writers", offered), Route("/write", write, methods=["POST"])]
    # any domain may resolve to 127.0.0.1, so requests with other host names are rejected
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS))])


def _is_ours(request) -> bool:
    """Whether a request comes from this page or from a program: browsers send the requesting page as the origin."""
    origin = request.headers.get("origin")
    return origin is None or origin == f"http://{request.headers.get('host', '')}"


def listen(port: int) -> socket.socket:
    """A socket that listens on `port` of 127.0.0.1; 0: any free port. Raises ValueError where the port cannot be used."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port is {port}; it must be between 0 (any free port) and 65535")
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            why = "is in use, maybe by another demo: stop that program, or"
        else:
            why = f"cannot be used ({os.strerror(error.errno)}):"
        raise ValueError(f"port {port} {why} choose another port with --port (0: any free port)") from None


def main(argv=None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="jaxpeft demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", nargs="+", default=[], help="finished runs; their frozen bases are added")
    parser.add_argument(
        "--base",
        nargs="+",
        default=[],
        help="checkpoints without tuning: 'tiny', directories, or owner/name on the Hugging Face hub",
    )
    parser.add_argument("--port", type=int, default=7860, help="port number; 0: any free port")
    registry.add_argument(parser)
    args = parser.parse_args(argv)
    if not args.workdir and not args.base:
        parser.error("give --workdir or --base")
    try:
        import uvicorn
    except ImportError:
        raise ValueError("the demo requires the extra `demo`: pip install 'jaxpeft[demo]'") from None
    malloc.keep_freed_memory()
    host.keep_compiled_programs()
    log = functools.partial(print, flush=True)  # so that a file or pipe gets it at once
    with listen(args.port) as sock:  # first, so that a port in use is an error before the minute of loading
        writers = load(args.workdir, args.base, log, args.imports)
        warm(writers, log=log)
        log(f"open http://127.0.0.1:{sock.getsockname()[1]}")  # the socket already listens
        # no log_config: uvicorn's would close the handlers of absl, and with them the stream that absl writes to
        settings = uvicorn.Config(app(writers), log_config=None, log_level="warning")
        uvicorn.Server(settings).run(sockets=[sock])
