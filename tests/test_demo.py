"""The demo page without models: the order of its cards, what it prints and refuses, its errors, and its script in node.

With models it is in test_use.py.
"""

import contextlib
import io
import json
import re
import shutil
import socket
import subprocess
import threading
import time
import types
import urllib.error
import urllib.request

import numpy as np
import pytest
import uvicorn
from PIL import Image

from jaxpeft.apps import demo
from jaxpeft.apps.demo import Writer
from jaxpeft.inputs import images


@pytest.fixture
def finished(tmp_path):
    """(where, base, task, ...) -> the directory of a finished run, as far as the page looks before it loads it."""

    def make(where, base, task, **model):
        workdir = tmp_path / where
        workdir.mkdir(parents=True)
        (workdir / "config.json").write_text(json.dumps({"base": base, "task": task, "model": model}))
        (workdir / "result.json").write_text("{}")
        return str(workdir)

    return make


@pytest.fixture
def events(monkeypatch):
    """What was printed and loaded, in that order; nothing is really loaded."""
    found = []

    def load_run(workdir, imports=()):
        found.append(("run", workdir))
        task = json.loads((demo.Path(workdir) / "config.json").read_text())["task"]
        return None, None, None, types.SimpleNamespace(kind=task)

    def load(base, **options):
        found.append(("base", base, *options.values()))
        return None, None

    monkeypatch.setattr(demo.finished, "load_run", load_run)
    monkeypatch.setattr(demo.loading, "load", load)
    return found


def cards(writers):
    """Names by group, in the page's order."""
    groups = []
    for i, one in enumerate(writers):
        if not i or one.group != writers[i - 1].group:
            groups.append([])
        groups[-1].append(one.name)
    assert len(groups) == len({one.group for one in writers})  # none comes twice
    return groups


def test_each_base_has_the_runs_tuned_from_it_right_behind_it(finished, events):
    """Runs of two bases and two tasks, given in another order; two have one name."""
    runs = [
        finished("a/mine", "tiny", "captioning"),
        finished("b/mine", "checkpoints/blip", "captioning"),
        finished("c/asks", "tiny", "vqa"),
        finished("d/other", "tiny", "captioning"),
        finished("e/large", "tiny", "captioning", image_size=384),
    ]
    assert cards(demo.load(runs, ["elsewhere/blip"], log=lambda _: None)) == [
        ["tiny, frozen", "a/mine", "other"],
        ["checkpoints/blip, frozen", "b/mine"],
        ["tiny, frozen", "asks"],
        ["tiny, frozen, 384 pixels", "large"],
        ["elsewhere/blip"],
    ]
    assert [event[1:] for event in events if event[0] == "base"] == [
        ("tiny", "captioning", None),
        ("checkpoints/blip", "captioning", None),
        ("tiny", "vqa", None),
        ("tiny", "captioning", 384),  # pictures as the run had them
        ("elsewhere/blip",),
    ]


def test_a_line_comes_before_every_load(finished, events, monkeypatch):
    run, other = finished("mine", "tiny", "vqa"), finished("other", "tiny", "vqa")
    demo.load([run, other, run], ["blip"], log=events.append)
    assert events == [
        f"loading {run} ...", ("run", run),
        f"loading {other} ...", ("run", other),
        f"loading tiny, the frozen base of {run}, {other} ...", ("base", "tiny", "vqa", None),
        "loading blip ...", ("base", "blip"),
    ]  # fmt: skip
    monkeypatch.setattr(demo, "generate", lambda *args, **_: events.append("compiled"))
    model = types.SimpleNamespace(tasks=("captioning",))
    demo.warm([Writer("one", model, {}, None, 0), Writer("two", model, {}, None, 0)], log=events.append)
    assert events[8:] == ["compiling one ...", "compiled", "compiling two ...", "compiled"]


@pytest.mark.parametrize(
    "paths, expected",
    [
        (["/runs/mine"], ["mine"]),
        (["/runs/a/mine", "/runs/b/mine", "/runs/b/new"], ["a/mine", "b/mine", "new"]),
        (["/a/x/mine", "/b/x/mine", "/b/y/mine"], ["a/x/mine", "b/x/mine", "y/mine"]),
        (["tiny", "checkpoints/tiny"], ["tiny", "checkpoints/tiny"]),
        (["/mine", "/old/mine"], ["/mine", "old/mine"]),
    ],
)
def test_names_are_the_shortest_ends_that_differ(paths, expected):
    assert demo.tails(paths) == dict(zip(paths, expected, strict=True))


# ---------------------------------------------------------------- the command line


def error_of(argv, capsys) -> str:
    """The one line of the error that is raised before anything is printed."""
    with pytest.raises(ValueError) as caught:
        demo.main(argv)
    assert capsys.readouterr().out == "" and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_workdir_that_is_not_finished_is_said_before_anything_is_loaded(finished, events, tmp_path, capsys):
    run, unfinished = finished("mine", "tiny", "vqa"), tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_text("{}")
    for workdir, missing in ((unfinished, "result.json"), (tmp_path / "nowhere", "result.json")):
        said = error_of(["--port", "0", "--workdir", run, str(workdir)], capsys)
        assert said.startswith(f"{workdir} holds no finished run: {missing} not found; finish the run")
    (tmp_path / "mine" / "config.json").write_text('{"task": "vqa"}')
    assert "mine holds no jaxpeft run (KeyError: 'base')" in error_of(["--port", "0", "--workdir", run], capsys)
    assert not events


def test_a_port_that_cannot_be_had_is_said_before_anything_is_loaded(finished, events, capsys):
    run = finished("mine", "tiny", "vqa")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = error_of(["--workdir", run, "--port", str(port)], capsys)
    assert said.startswith(f"port {port} is in use") and "choose another port with --port" in said
    assert "--port is 70000; it must be between 0" in error_of(["--workdir", run, "--port", "70000"], capsys)
    assert not events


def test_the_address_is_printed_when_the_page_answers(monkeypatch):
    said, servers = [], []

    class Server(uvicorn.Server):
        def __init__(self, *args):
            super().__init__(*args)
            servers.append(self)

    def say(text, flush):
        """Keep the line and, of one with an address, what a visitor is sent who comes at this moment."""
        said.append(text)
        assert flush
        if text.startswith("open "):
            address = text.removeprefix("open ")
            visitor.append(threading.Thread(target=lambda: answers.append(fetch(f"{address}/writers")[0])))
            visitor[0].start()

    answers, visitor = [], []
    monkeypatch.setattr(uvicorn, "Server", Server)
    monkeypatch.setattr(demo, "print", say, raising=False)
    monkeypatch.setattr(demo, "load", lambda workdirs, bases, log, imports: log("loading ...") or [])
    monkeypatch.setattr(demo, "warm", lambda writers, log: log("compiling ..."))
    program = threading.Thread(target=demo.main, args=(["--base", "tiny", "--port", "0"],))
    program.start()
    end = time.monotonic() + 30
    while not answers and time.monotonic() < end:
        time.sleep(0.01)
    servers[0].should_exit = True
    program.join()
    visitor[0].join()
    assert said[:2] == ["loading ...", "compiling ..."] and re.fullmatch(r"open http://127\.0\.0\.1:\d+", said[2])
    assert answers == [200] and len(said) == 3


# ---------------------------------------------------------------- the page's own script


def fetch(address, data=None, **headers):
    """(status, JSON) of a request; None for an answer that is not JSON."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=30) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            said = error.read()
        return error.code, json.loads(said) if said.startswith(b"{") else None


@contextlib.contextmanager
def serving(app):
    """The address at which `app` answers."""
    with demo.listen(0) as sock:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def replies(monkeypatch):
    """What /writers and /write send for two bases with a run of each; a model writes its own name."""
    model = types.SimpleNamespace(tasks=("captioning",))
    writers = [
        Writer(name, model, name, None, group) for name, group in (("base", 0), ("run", 0), ("base 2", 1), ("run 2", 1))
    ]
    monkeypatch.setattr(images, "decode", lambda data, name: np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr(demo, "generate", lambda model, name, *_, **__: [[{"text": name, "score": -1.0}]])
    with serving(demo.app(writers)) as address:
        return {"writers": fetch(f"{address}/writers")[1], "write": fetch(f"{address}/write", b"a picture")[1]}


@pytest.fixture(scope="module")
def page():
    """The address of a page without models, which looks at every request all the same."""
    with serving(demo.app([])) as address:
        yield address


@pytest.mark.parametrize(
    "query, data, status, message",
    [
        ("", b"no picture", 400, "cannot decode"),
        ("?top=99", b"", 400, "between 1 and 10"),
        ("?top=x", b"", 400, "invalid"),
    ],
)
def test_the_page_says_what_is_wrong(page, query, data, status, message):
    found = fetch(f"{page}/write{query}", data)
    assert found[0] == status and message in found[1]["error"]


def test_a_picture_that_is_too_large_is_refused(page, monkeypatch):
    monkeypatch.setattr(demo, "MOST_BYTES", 1 << 20)
    assert fetch(f"{page}/write", bytes(2 << 20))[0] == 413


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Origin": "https://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "rebound.example"}, 400),  # a stranger's name for 127.0.0.1
        ({"Host": "rebound.example", "Origin": "http://rebound.example"}, 400),
        ({}, 200),
        ({"Origin": "the page"}, 200),
    ],
)
def test_only_our_own_page_may_use_it(page, headers, status):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    headers = {name: page if value == "the page" else value for name, value in headers.items()}
    assert fetch(f"{page}/write", picture.getvalue(), **headers)[0] == status


# As much of a browser as the page's script uses. Requests wait in `pending` until a test answers them.
BROWSER = """
class Element {
  constructor(tag = "") {
    Object.assign(this, { tag, children: [], textContent: "", className: "", value: "", disabled: false });
    this.classList = { add() {}, remove() {} };
  }
  append(...more) { this.children.push(...more); more.forEach(one => one.parent = this); }
  prepend(one) { this.children.unshift(one); one.parent = this; }
  remove() { this.parent.children = this.parent.children.filter(one => one !== this); }
  replaceChildren() { this.children = []; }
  querySelectorAll(tags) { return this.children.filter(one => tags.split(", ").includes(one.tag)); }
}
const elements = {}, form = new Element("form"), pending = [];
globalThis.document = {
  getElementById: id => elements[id] ??= new Element(),
  createElement: tag => new Element(tag),
  querySelector: () => form,
};
globalThis.Image = class extends Element { constructor() { super("img"); } };
URL.createObjectURL = file => "blob:" + file.name;
globalThis.fetch = address => new Promise((resolve, reject) => pending.push({ address, resolve, reject }));
"""

# What a test says with.
HANDS = """
const rest = () => new Promise(resolve => setTimeout(resolve, 0));
const choose = async (name, size = 1000) => {
  $("file").onchange({ target: { files: [{ name, size }] } });
  await rest();
};
const reply = async (one, status, found) => {
  const json = async () => { if (found === undefined) throw new SyntaxError("not JSON"); return found; };
  one.resolve({ ok: status < 400, status, json });
  await rest();
};
const texts = card => card.children.map(one => one.textContent);
const shown = () => $("rows").children.map(group => group.children.map(texts));
const state = () => ({ cards: shown(), said: $("said").textContent, error: $("said").className === "error",
                       picture: $("drop").children[0]?.src, ready: !$("go").disabled, requests: pending.length });
"""


def in_node(replies, scenario) -> list[dict]:
    """The states that `scenario` keeps, played on the page's script after it was told what is offered."""
    node = shutil.which("node")
    if not node:
        pytest.skip("runs the page's script: node on the path")
    (script,) = re.findall(r"<script>(.*?)</script>", demo.PAGE.read_text(encoding="utf-8"), re.DOTALL)
    given = f"const replies = {json.dumps(replies)}, kept = [];\n"
    play = f"await reply(pending.shift(), 200, replies.writers);\n{scenario}\nconsole.log(JSON.stringify(kept));"
    code = f"{BROWSER}{given}{script}{HANDS}(async () => {{ {play} }})();"
    done = subprocess.run([node, "-"], input=code, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_cards_stand_in_groups_a_base_first(replies):
    (state,) = in_node(replies, """
      await choose("a.png");
      await reply(pending.shift(), 200, replies.write);
      kept.push(state());
    """)  # fmt: skip
    names = [[(card[0], card[1]) for card in group] for group in state["cards"]]
    assert names == [[("base", "base"), ("run", "run")], [("base 2", "base 2"), ("run 2", "run 2")]]
    assert state["ready"] and not state["error"] and state["picture"] == "blob:a.png"


@pytest.mark.parametrize(
    "failure, said",
    [
        ('await choose("b.png"); await reply(pending.shift(), 400, { error: "cannot decode it" })', "cannot decode it"),
        ('await choose("b.png"); await reply(pending.shift(), 413, { error: "too many MB" })', "too many MB"),
        ('await choose("b.png"); await reply(pending.shift(), 500)', "server error (status 500)"),
        ('await choose("b.png"); pending.shift().reject(new TypeError()); await rest()', "no answer"),
        ('await choose("b.png", 33 * 2 ** 20)', "the image has 33.0 MB; it must have at most 32.0 MB"),
    ],
    ids=["no picture", "refused as too large", "server error", "server gone", "too large to send"],
)
def test_no_caption_of_the_last_picture_stands_under_one_that_fails(replies, failure, said):
    before, state = in_node(replies, f"""
      await choose("a.png");
      await reply(pending.shift(), 200, replies.write);
      kept.push(state());
      {failure};
      kept.push(state());
    """)  # fmt: skip
    assert before["cards"] and state["cards"] == []
    assert state["error"] and said in state["said"]
    assert state["picture"] == "blob:b.png" and state["ready"] and state["requests"] == 0


def test_captions_go_when_a_picture_is_taken_and_when_one_is_asked_about(replies):
    """Not only when the reply is there; with a question in the field a new picture waits for the button."""
    waiting, taken, asked = in_node(replies, """
      await choose("a.png");
      await reply(pending.shift(), 200, replies.write);
      await choose("b.png");
      kept.push(state());
      await reply(pending.shift(), 200, replies.write);
      $("question").value = "how many";
      await choose("c.png");
      kept.push(state());
      await choose("a.png");
      form.onsubmit({ preventDefault() {} });
      await reply(pending.shift(), 200, replies.write);
      form.onsubmit({ preventDefault() {} });
      kept.push(state());
    """)  # fmt: skip
    assert waiting["cards"] == taken["cards"] == asked["cards"] == []
    assert (waiting["requests"], taken["requests"], asked["requests"]) == (1, 0, 1)
    assert "generating" in waiting["said"] and taken["said"] == "" and taken["ready"] and not asked["ready"]


@pytest.mark.parametrize("late", ["200, replies.write", '400, { error: "cannot decode a.png" }'])
def test_a_late_reply_to_an_earlier_picture_is_not_shown(replies, late):
    state, done = in_node(replies, f"""
      await choose("a.png");
      await choose("b.png");
      const [first, second] = pending;
      await reply(first, {late});
      kept.push(state());
      await reply(second, 200, replies.write.slice(0, 1));
      kept.push(state());
    """)  # fmt: skip
    assert state["cards"] == [] and "generating" in state["said"] and not state["ready"]
    assert [card[0] for group in done["cards"] for card in group] == ["base"] and done["ready"]
