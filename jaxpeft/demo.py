"""A local page: drop a picture, caption it or ask about it, and compare tuned runs with the frozen base.

    pip install 'jaxpeft[demo]'
    python -m jaxpeft.demo --workdir runs/mine runs/other        # then open the address that it prints

The page listens on this machine only and keeps no picture. `app` is an ordinary ASGI application.
"""

import argparse
import dataclasses
import sys
import threading
import time
from pathlib import Path

import numpy as np

from jaxpeft import evals, host, hub, images, point, stop, untrusted
from jaxpeft.tasks.base import Task
from jaxpeft.tree import Tree

PAGE = Path(__file__).parent / "assets" / "demo.html"
MOST_BYTES = 32 << 20  # of a picture
HOSTS = ("127.0.0.1", "localhost")


@dataclasses.dataclass
class Writer:
    """A model that the page offers: a tuned run, or the base of some of them."""

    name: str
    model: hub.Blip
    variables: Tree
    task: Task | None

    @property
    def asks(self) -> bool:
        """Whether it answers questions; else it captions."""
        return self.model.config.question_encoder


def load(workdirs: list[str], bases: list[str] = ()) -> list[Writer]:
    """The frozen base of every run, once, then the runs, then other checkpoints. Raises ValueError naming what is wrong."""
    frozen, tuned = {}, []
    for workdir in workdirs:
        model, variables, _, task = point.load_run(workdir)
        tuned.append(Writer(Path(workdir).name, model, variables, task))
        base = untrusted.read_json(Path(workdir) / "config.json")["base"]
        if (base, task.name) not in frozen:
            plain, params = hub.load(base, question_encoder=task.question_encoder)
            frozen[base, task.name] = Writer(f"{Path(base).name}, frozen", plain, {"params": params}, task)
    others = [Writer(Path(base).name, *_plain(base), None) for base in bases]
    return [*frozen.values(), *tuned, *others]


def _plain(base):
    model, params = hub.load(base)
    return model, {"params": params}


def warm(writers: list[Writer], top: int = 3) -> None:
    """Compile what the first pictures will need."""
    blank = np.zeros((64, 64, 3), np.uint8)
    for one in writers:
        evals.generate(
            one.model, one.variables, [blank], "-" if one.asks else None, batch_size=1, task=one.task, top=top
        )


def answers(writers: list[Writer], data: bytes, question: str, top: int = 3) -> list[dict]:
    """Per writer that fits (with a question those that answer, else those that caption): name, texts, seconds."""
    picture, rows = images.decode(data, name="that was sent"), []
    for one in writers:
        if one.asks == bool(question):
            began = time.perf_counter()
            (texts,) = evals.generate(
                one.model, one.variables, [picture], question or None, batch_size=1, task=one.task, top=top
            )
            rows.append({"name": one.name, "texts": texts, "seconds": time.perf_counter() - began})
    return rows


def app(writers: list[Writer]):
    """The page at /, what it offers at /writers, and POST /write?question=...&top=3 with a picture's bytes.

    Answers requests to this machine's own names only, and pictures only from its own page or from programs.
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
        return JSONResponse([{"name": one.name, "asks": one.asks} for one in writers])

    async def write(request):
        if not _is_ours(request):
            return JSONResponse({"error": "another site's page may not use this one"}, status_code=403)
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > MOST_BYTES:
                return JSONResponse({"error": f"the picture has more than {MOST_BYTES >> 20} MB"}, status_code=413)
        try:
            top = int(request.query_params.get("top", 3))
            if not 1 <= top <= 10:
                raise ValueError(f"top is {top}; it is 1 to 10")
            question = request.query_params.get("question", "").strip()
            return JSONResponse(await run_in_threadpool(locked, bytes(data), question, top))
        except ValueError as error:
            return JSONResponse({"error": str(error)}, status_code=400)

    routes = [Route("/", page), Route("/writers", offered), Route("/write", write, methods=["POST"])]
    # a name that a stranger's server resolves to 127.0.0.1 is not ours either
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS))])


def _is_ours(request) -> bool:
    """Whether a request comes from this page, or from a program: browsers name the page that asks as the origin."""
    origin = request.headers.get("origin")
    return origin is None or origin == f"http://{request.headers.get('host', '')}"


def main(argv=None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxpeft.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", nargs="+", default=[], help="finished runs; their frozen bases come with them")
    parser.add_argument("--base", nargs="+", default=[], help="checkpoints with nothing tuned")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args(argv)
    if not args.workdir and not args.base:
        parser.error("give --workdir or --base")
    try:
        import uvicorn
    except ImportError:
        sys.exit("error: the page needs the extra `demo`: pip install 'jaxpeft[demo]'")
    host.keep_freed_memory()
    host.keep_compiled_programs()
    try:
        writers = load(args.workdir, args.base)
    except ValueError as error:
        sys.exit(f"error: {error}")
    warm(writers)
    print(f"open http://127.0.0.1:{args.port}")
    uvicorn.run(app(writers), host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    stop.program(main)
