"""Checkpoints from the Hugging Face hub, from a small hub on this machine that speaks its protocol and notes every request."""

import collections
import errno
import hashlib
import http.server
import json
import logging
import os
import pathlib
import shutil
import threading
import time
import urllib.parse

import huggingface_hub
import jax.numpy as jnp
import pytest
import tiny
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _shared_blobs
from safetensors.numpy import load, save
from test_hub import BLIP_PROCESSOR, WORDS

from jaxpeft import tree
from jaxpeft.models import downloads, loading
from jaxpeft.runtime import signals

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAME = "owner/a-blip"
COMMIT, OTHER = "a" * 40, "b" * 40


def golden(name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (GOLDEN / name).iterdir()}


def captioner() -> dict[str, bytes]:
    """A repository as people publish them: what is read, and much that is not."""
    files = golden("blip_caption_tiny") | {"vocab.txt": "\n".join(WORDS).encode() + b"\n"}
    files["preprocessor_config.json"] = json.dumps(BLIP_PROCESSOR).encode()
    decoys = ("pytorch_model.bin", "tf_model.h5", "README.md", ".gitattributes", "modeling_blip.py", "onnx/config.json")
    return files | dict.fromkeys(decoys, b"not to be read")


READ = {"config.json", "preprocessor_config.json", "vocab.txt", "model.safetensors"}  # of `captioner`


class Hub:
    """Repositories over HTTP: {name: {commit: {file: bytes}}} and {name: {branch or tag: commit}}."""

    def __init__(self):
        self.repositories, self.refs = {NAME: {COMMIT: captioner()}}, {NAME: {"main": COMMIT}}
        self.requests = []  # (method, path without the query)
        self.errors = {}  # (method, end of a path) -> (status, the hub's code for it)
        self.answering = threading.Event()  # cleared: nobody is answered
        self.answering.set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self):
        self.answering.set()
        huggingface_hub.close_session()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def fetched(self, method="GET") -> list[str]:
        """The names of the files that were asked for, sorted."""
        found = [path.split("/", 5)[5] for verb, path in self.requests if verb == method and "/resolve/" in path]
        return sorted(found)

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body)"""
        for (verb, end), (status, code) in self.errors.items():
            if verb == method and path.endswith(end):
                return status, {"X-Error-Code": code} if code else {}, b""
        api = path.startswith("/api/models/")
        owner, name, *rest = path.removeprefix("/api/models/").strip("/").split("/")
        repository = f"{owner}/{name}"
        if repository not in self.repositories:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        commits = self.repositories[repository]
        revision = urllib.parse.unquote(rest[1]) if len(rest) > 1 else "main"
        commit = self.refs[repository].get(revision, revision)
        if commit not in commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = commits[commit]
        if api and rest[:1] == ["tree"]:
            rows = [{"type": "file", "path": path, "size": len(x), "oid": _digest(x)} for path, x in files.items()]
            return 200, {}, json.dumps(rows).encode()
        if api:
            siblings = [{"rfilename": path} for path in files]
            return 200, {}, json.dumps({"id": repository, "sha": commit, "siblings": siblings}).encode()
        file = "/".join(rest[2:])
        if file not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{_digest(files[file])}"'}, files[file]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path))
        self.hub.answering.wait(20)
        status, headers, body = self.hub.answer(self.command, path)
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub, and the library set to it: its address, an empty cache, no token, no proxy."""
    server = Hub()
    settings = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,  # else it asks for, and keeps, a list of programs that may call it
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)  # 'owner/name' is not a local directory
    huggingface_hub.close_session()
    downloads._commit.cache_clear()
    yield server
    server.close()
    downloads._commit.cache_clear()


def another_process(server) -> None:
    """As if another process began: branches are resolved again, and no request was made yet."""
    downloads._commit.cache_clear()
    server.requests.clear()


def offline(monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def snapshot(commit=COMMIT) -> pathlib.Path:
    return pathlib.Path(constants.HF_HUB_CACHE) / "models--owner--a-blip" / "snapshots" / commit


# ---------------------------------------------------------------- what is downloaded


def test_a_repository_is_what_its_files_are(server, tmp_path, capfd):
    model, params, report = loading.read(NAME)
    for name, content in captioner().items():
        if name in READ:
            (tmp_path / "same").mkdir(exist_ok=True)
            (tmp_path / "same" / name).write_bytes(content)
    there, same, expected = loading.read(tmp_path / "same")
    assert model == there and tree.digest(params) == tree.digest(same)
    assert report == expected | {"source": NAME, "revision": COMMIT}
    assert set(server.fetched()) == READ and len(server.fetched()) == len(READ)
    size = sum(len(captioner()[name]) for name in READ - {"config.json"}) / 1e6
    line = f"downloading {NAME} at aaaaaaaa: 3 files, {size:.1f} MB, into {tmp_path / 'cache'}\n"
    assert capfd.readouterr() == (line, "")  # and no progress bar, for this is no terminal


def test_what_is_cached_is_not_downloaded_again_and_nothing_is_said(server, capfd):
    loading.load(NAME)
    another_process(server)
    capfd.readouterr()
    loading.load(NAME)
    assert server.requests == [("GET", f"/api/models/{NAME}")]  # what the branch is now
    assert capfd.readouterr() == ("", "")


def test_a_full_commit_in_the_cache_needs_no_request(server, monkeypatch):
    _, params, report = loading.read(NAME)
    another_process(server)
    for again in (loading.read(NAME, revision=report["revision"]), loading.read(f"{NAME}@{COMMIT}")):
        assert tree.digest(again[1]) == tree.digest(params) and again[2] == report
    loading.abstract(NAME, revision=COMMIT)
    assert server.requests == []
    server.close()
    assert loading.read(NAME, revision=COMMIT)[2] == report


def test_offline_a_branch_is_what_it_was_when_it_was_last_asked_for(server, monkeypatch, caplog):
    _, _, report = loading.read(NAME)
    another_process(server)
    offline(monkeypatch)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    assert loading.read(NAME, revision=COMMIT)[2] == report and loading.read(NAME)[2] == report
    assert server.requests == [] and caplog.text == ""  # the library does not complain of what was asked for


def test_a_full_commit_that_is_not_in_the_cache_is_downloaded(server):
    assert loading.read(NAME, revision=COMMIT)[2]["revision"] == COMMIT
    assert set(server.fetched()) == READ


def test_planning_downloads_no_weights(server, capsys):
    plan = loading.abstract(NAME)
    assert set(server.fetched()) == READ - {"model.safetensors"}
    assert "2 files, 0.0 MB" in capsys.readouterr().out
    server.requests.clear()
    assert loading.read(NAME)[0] == plan
    assert server.fetched() == ["model.safetensors"] and "1 file, 0.4 MB" in capsys.readouterr().out


def test_what_was_planned_is_what_is_read(server):
    """A branch that moves between the two: one process keeps the commit that it began with."""
    loading.abstract(NAME)
    server.repositories[NAME][OTHER] = captioner()
    server.refs[NAME]["main"] = OTHER
    assert loading.read(NAME)[2]["revision"] == COMMIT
    another_process(server)
    assert loading.read(NAME)[2]["revision"] == OTHER


def test_pickled_weights_are_taken_where_there_are_no_others(server):
    files = golden("blip_bin_tiny")
    del files["model.safetensors"]
    server.repositories[NAME][COMMIT] = files
    params = loading.load(NAME)[1]
    assert server.fetched() == ["config.json", "pytorch_model.bin"]
    assert tree.digest(params) == tree.digest(loading.load(GOLDEN / "blip_bin_tiny")[1])


def sharded(files: dict[str, bytes], **more) -> dict[str, bytes]:
    """The files with their weights in two parts and an index, which also says `more`: {tensor: file}."""
    tensors = load(files.pop("model.safetensors"))
    parts = collections.defaultdict(dict)
    for i, (name, x) in enumerate(tensors.items()):
        parts[f"model-{i % 2}.safetensors"][name] = x
    names = {name: file for file, part in parts.items() for name in part} | more
    return files | {file: save(part) for file, part in parts.items()} | {
        "model.safetensors.index.json": json.dumps({"weight_map": names}).encode(),
        "model-9.safetensors": b"of no index",
    }  # fmt: skip


def test_the_parts_that_an_index_names_are_downloaded(server, capsys):
    server.repositories[NAME][COMMIT] = sharded(captioner())
    params = loading.load(NAME)[1]
    index = "model.safetensors.index.json"
    expected = READ - {"model.safetensors"} | {index, "model-0.safetensors", "model-1.safetensors"}
    assert set(server.fetched()) == expected and "4 files" in capsys.readouterr().out
    assert tree.digest(params) == tree.digest(loading.load(GOLDEN / "blip_caption_tiny")[1])


@pytest.mark.parametrize("name", ["../config.json", "onnx/config.json", "/etc/passwd", "", "..", 3, "model-7.bin", "*"])
def test_an_index_names_plain_files_of_its_repository(server, name):
    server.repositories[NAME][COMMIT] = sharded(captioner(), x=name)
    problem = (
        "expected the name of a file|lists (model-7.bin|.), which is not in the repository|is not an index of weights"
    )
    with pytest.raises(ValueError, match=f"{NAME} at aaaaaaaa cannot be used: .*({problem})"):
        loading.load(NAME)
    assert set(server.fetched()) == {"config.json", "model.safetensors.index.json"}


@pytest.mark.slow
def test_a_repository_of_our_own_format(server, tmp_path):
    tiny.saved(tmp_path / "ours", tiny.model(), name="tiny one")
    files = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    server.repositories[NAME][COMMIT] = files | {"pytorch_model.bin": b"no"}
    model, loaded, report = loading.read(NAME)
    there, same, expected = loading.read(tmp_path / "ours")
    assert model == there and tree.digest(loaded) == tree.digest(same)
    assert report == expected | {"source": NAME, "revision": COMMIT}
    assert set(server.fetched()) == set(files)


# ---------------------------------------------------------------- revisions and names


def test_branches_tags_and_commits(server):
    files = captioner()
    tensors = load(files["model.safetensors"])
    files["model.safetensors"] = save({name: 2 * x for name, x in tensors.items()})
    server.repositories[NAME][OTHER] = files
    server.refs[NAME] |= {"v2": OTHER, "refs/pr/1": OTHER}
    first = loading.load(NAME)[1]["vision"]["position"]
    ways = (f"{NAME}@v2", None), (NAME, "v2"), (NAME, OTHER), (f"{NAME}@{OTHER}", OTHER), (f"{NAME}@refs/pr/1", None)
    for path, revision in ways:
        _, params, report = loading.read(path, revision=revision)
        assert report["source"] == NAME and report["revision"] == OTHER
        assert jnp.array_equal(params["vision"]["position"], 2 * first)
        assert loading.abstract(path, revision=revision) == loading.abstract(NAME)
        assert loading.load(path, revision=revision)[0] == loading.load(NAME)[0]


@pytest.mark.parametrize(
    ("path", "revision", "message"),
    [
        (f"{NAME}@v1", "v2", f"{NAME}@v1 contains a revision that differs from revision=v2; give only one of them"),
        (NAME, "../../x", "'../../x' is not a valid revision of owner/a-blip; give a commit, branch or tag"),
        (NAME, "", "'' is not a valid revision"),
        (f"{NAME}@a b", None, "'a b' is not a valid revision"),
        (NAME, "v7", "owner/a-blip has no revision 'v7'; https://huggingface.co/owner/a-blip/tree/main lists its"),
        (NAME, "c" * 40, "owner/a-blip has no revision 'cccc"),
        ("tiny", "v1", "revision v1 was given, but 'tiny' is a local checkpoint and has no revisions"),
    ],
)
def test_revisions_that_cannot_be(server, path, revision, message):
    with pytest.raises(ValueError) as error:
        loading.load(path, revision=revision)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    with pytest.raises(ValueError) as error:
        loading.abstract(path, revision=revision)
    assert str(error.value).startswith(message)
    assert server.fetched() == []


@pytest.mark.parametrize(
    "path",
    ["", "blip", "a/b/c", "/owner/blip", "./blip", "../blip", "~/blip", "owner/", "/blip", "owner/blip/", "owner//blip",
     "owner/.blip", "owner/-blip", "own er/blip", "owner/a--b", "owner/a..b", "owner/blip.git", "owner/blip@", "user@host:a/b",
     "owner/bl\u00ecp", "hf://owner/blip", "owner\\blip"],
)  # fmt: skip
def test_names_that_are_no_repository(server, path):
    assert downloads.parse(path) is None
    if path:
        with pytest.raises(
            ValueError,
            match=r"no checkpoint at .*shipped names: tiny, tiny_decoder, tiny_mplug; or owner/name or owner/name@revision of",
        ):
            loading.load(path)
    assert server.requests == []


def test_a_directory_of_that_name_comes_first(server, tmp_path):
    directory = tmp_path / NAME
    shutil.copytree(GOLDEN / "blip_caption_tiny", directory)
    for path in (NAME, f"{NAME}/", f"./{NAME}", directory, pathlib.Path(NAME)):
        assert loading.read(path)[2]["source"] == "a-blip" and "revision" not in loading.read(path)[2]
        loading.abstract(path)
    with pytest.raises(ValueError, match="'owner/a-blip' is a local checkpoint and has no revisions; leave the rev"):
        loading.load(NAME, revision=COMMIT)
    (directory / "config.json").unlink()
    with pytest.raises(ValueError, match="no checkpoint at"):
        loading.load(NAME)
    assert server.requests == []


# ---------------------------------------------------------------- what goes wrong


def refused(path=NAME, **options) -> str:
    """The error of loading, which is one line."""
    with pytest.raises(ValueError) as error:
        loading.load(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


LOGIN = "log in with `hf auth login` or set HF_TOKEN"


def test_a_repository_that_does_not_exist(server):
    expected = (
        "owner/typo is not a local directory, and the Hugging Face hub has no repository of that name or it is private; "
        f"check the name, or {LOGIN}"
    )
    assert refused("owner/typo") == refused("owner/typo", revision=COMMIT) == expected


@pytest.mark.parametrize(
    "where",
    [
        ("GET", f"/api/models/{NAME}"),
        ("HEAD", "config.json"),
        ("HEAD", "model.safetensors"),
        ("HEAD", "model.safetensors.index.json"),
    ],
)
@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository(server, where, status):
    if where[1].endswith("index.json"):
        server.repositories[NAME][COMMIT] = sharded(captioner())
    server.errors[where] = status, "GatedRepo"
    assert (
        refused() == f"owner/a-blip is gated: accept its licence at https://huggingface.co/owner/a-blip, then {LOGIN}"
    )
    assert not any(name.endswith(".safetensors") for name in server.fetched())


def test_a_token_that_is_refused(server, monkeypatch):
    server.errors["GET", f"/api/models/{NAME}"] = 401, ""
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    assert refused() == f"the Hugging Face hub rejected the token that is set; {LOGIN} to a valid one"


def elsewhere(revision="") -> str:
    command = f"`hf download {NAME}{revision and f' --revision {revision}'} --local-dir DIR`"
    return f"run {command} on a machine with a network, copy DIR here and set base=DIR"


def test_a_server_that_fails(server):
    server.errors["GET", f"/api/models/{NAME}"] = 500, ""
    message = refused()
    assert message.startswith("owner/a-blip is not a local directory and cannot be downloaded (Server error '500 ")
    assert message.endswith(elsewhere())


def test_a_download_that_breaks_is_done_again(server):
    server.errors["GET", "model.safetensors"] = 500, ""
    assert "cannot be downloaded (" in refused() and not (snapshot() / "model.safetensors").exists()
    server.errors.clear()
    server.requests.clear()
    loading.load(NAME)
    assert server.fetched() == ["model.safetensors"]


def test_no_network(server):
    server.close()
    for revision in (None, "v2", COMMIT):
        message = refused(revision=revision)
        assert "cannot be downloaded ([Errno 111] Connection refused); " in message
        assert message.endswith(elsewhere(revision or ""))


def test_a_server_that_never_answers_is_given_up(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    server.answering.clear()
    start = time.monotonic()
    assert refused().endswith(elsewhere()) and refused(revision=COMMIT).endswith(elsewhere(COMMIT))
    assert time.monotonic() - start < 10


def test_offline_with_nothing_or_too_little_in_the_cache(server, monkeypatch, capsys):
    offline(monkeypatch)
    cache = constants.HF_HUB_CACHE
    where = f"is not a local directory, and not all of it is in the cache {cache}; unset HF_HUB_OFFLINE, or run"
    assert refused().startswith(f"owner/a-blip {where} `hf download owner/a-blip --local-dir DIR` on a machine")
    assert refused(revision=COMMIT).startswith(f"owner/a-blip at {COMMIT} {where}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    loading.abstract(NAME)
    another_process(server)
    offline(monkeypatch)
    capsys.readouterr()
    assert loading.abstract(NAME) == loading.abstract(NAME, revision=COMMIT)
    assert refused().startswith(f"owner/a-blip at {COMMIT} {where}")  # the weights
    assert server.requests == [] and capsys.readouterr().out == ""


def test_offline_with_files_that_another_program_downloaded(server, monkeypatch):
    """One by one, as transformers does: the cache has no list of the repository's files."""
    for name in READ:
        huggingface_hub.hf_hub_download(NAME, name)
    another_process(server)
    offline(monkeypatch)
    assert loading.read(NAME)[2]["revision"] == COMMIT and loading.load(NAME, revision=COMMIT)[0].tokenizer
    assert server.requests == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config.json": b'{"model_type": "bert"}'}, "config.json: model_type 'bert' is unsupported; choose one of blip"),
        ({"config.json": b'{"model_type": "blip", "architectures": ["BlipForImageTextRetrieval"]}'},
         "supported: BlipForConditionalGeneration, BlipForQuestionAnswering"),
        ({"config.json": b"<html>"}, "config.json is not JSON"),
        ({"config.json": None}, "config.json is missing; it belongs beside the weights of a Hugging Face checkpoint"),
        ({"manifest.json": b"{}"}, "manifest.json is not a jaxpeft manifest"),
    ],
)  # fmt: skip
def test_what_is_no_blip_is_refused_before_its_weights_come(server, changes, message):
    files = captioner() | changes
    server.repositories[NAME][COMMIT] = {name: content for name, content in files.items() if content is not None}
    error = refused()
    assert error.startswith("owner/a-blip at aaaaaaaa cannot be used: ") and message in error
    assert set(server.fetched()) <= {"config.json", "manifest.json"}


def test_a_repository_without_weights_that_are_read(server):
    files = captioner()
    del files["model.safetensors"], files["pytorch_model.bin"]
    server.repositories[NAME][COMMIT] = files
    assert refused() == (
        "owner/a-blip at aaaaaaaa has no supported weights (model.safetensors, "
        "model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json); use another revision, or load it "
        "with transformers, save it with save_pretrained('DIR') and set base=DIR"
    )
    loading.abstract(NAME)  # planning needs none


def test_a_full_disk_stays_an_error_of_the_machine(server, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        loading.load(NAME)
    assert signals.is_transient(error.value)


# ---------------------------------------------------------------- links of the cache


def test_files_in_the_store_that_repositories_share_are_read(server):
    """The library keeps files of its newer storage once for all repositories: NAME -> blobs/DIGEST -> CACHE/blobs/00/HASH."""
    expected = loading.read(NAME)[2]
    files = {}
    for i, name in enumerate(READ):
        blob = (snapshot() / name).resolve()
        where = {"xet_hash": f"{i:064x}", "cache_dir": constants.HF_HUB_CACHE, "expected_size": blob.stat().st_size}
        assert _shared_blobs.publish_blob_to_shared_store(blob_path=str(blob), **where)
        files[name] = (snapshot() / name).resolve()
        assert blob.is_symlink() and files[name].is_relative_to(pathlib.Path(constants.HF_HUB_CACHE) / "blobs")

    server.requests.clear()
    loading.abstract(NAME, revision=COMMIT)
    assert loading.read(NAME, revision=COMMIT)[2] == expected and server.requests == []
    assert {path.name for path in snapshot().iterdir()} == READ and all(file.exists() for file in files.values())
    assert not huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE).warnings  # the library takes them as they are
