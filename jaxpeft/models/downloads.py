"""Download base checkpoints from the Hugging Face hub to the cache of `huggingface_hub` (HF_HOME, HF_HUB_CACHE).

Only files that a checkpoint is read from are downloaded, and no code of a repository is executed. A commit in the cache is
read without a request. HF_HUB_OFFLINE=1 disables all requests; HF_TOKEN or `hf auth login` gives access to private and gated
repositories; HF_ENDPOINT selects another hub.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import tqdm, validate_repo_id

from jaxpeft.inputs import tokenizer
from jaxpeft.models import convert
from jaxpeft.runtime import files, signals

FIRST = ("manifest.json", "config.json")  # show whether the checkpoint is supported
SETTINGS = (*FIRST, "preprocessor_config.json", "processor_config.json", *tokenizer.FILES, "tokenizer_config.json",
            "special_tokens_map.json", "added_tokens.json")  # fmt: skip
_REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]*", re.ASCII)


def parse(path: str, revision: str | None = None) -> tuple[str, str | None] | None:
    """Parse 'owner/name' or 'owner/name@revision' to ('owner/name', revision); None if it cannot be a repository.

    Raises ValueError if `revision` differs from the one in `path`, or is not a valid commit, branch or tag.
    """
    repository, at, said = path.partition("@")
    if repository.count("/") != 1 or (at and not said):
        return None
    try:
        validate_repo_id(repository)
    except ValueError:
        return None
    if said and revision is not None and said != revision:
        raise ValueError(f"{path} contains a revision that differs from revision={revision}; give only one of them")
    chosen = said or revision
    if chosen is not None and not _REVISION.fullmatch(chosen):
        raise ValueError(f"{chosen!r} is not a valid revision of {repository}; give a commit, branch or tag")
    return repository, chosen


def fetch(
    repository: str,
    revision: str | None = None,
    *,
    check: Callable[[Path], object],
    weights: bool = True,
    log: Callable[[str], object] = print,
) -> tuple[Path, str]:
    """Download the files of `owner/name` that a checkpoint is read from and that the cache lacks -> (directory, commit).

    `revision` is a commit, branch or tag, None for the default branch. A branch or tag is resolved to a commit once per
    process, so planning and training use the same. With a full commit (40 hexadecimal digits) whose files are in the cache
    no request is made. `check` is called with the directory when it has only `FIRST`, and raises ValueError for an
    unsupported checkpoint, so that nothing large is downloaded. `weights=False` omits the weights. `log` gets one line before
    a download.

    Raises a one-line ValueError with what to do if the repository or revision does not exist, needs a login or has no
    supported weights, or if the hub cannot be reached. Disk errors stay OSErrors.
    """
    with _explained(repository, revision):
        commit = _commit(repository, revision)
        directory, sizes = _listed(repository, commit)
    with _unusable(repository, commit):
        check(directory)
    names = [name for name in SETTINGS if name in sizes]
    if weights:
        names += _weights(repository, commit, sizes)
    missing = [name for name in names if not (directory / name).exists()]
    if missing and not huggingface_hub.is_offline_mode():
        size = sum(sizes[name] for name in missing) / 1e6
        files = "1 file" if len(missing) == 1 else f"{len(missing)} files"
        log(f"downloading {repository} at {commit[:8]}: {files}, {size:,.1f} MB, into {constants.HF_HUB_CACHE}")
    for name in names:
        _download(repository, commit, name)
    return directory, commit


class _Api(huggingface_hub.HfApi):
    """The library's client waits forever for a server that does not answer; this one has a timeout."""

    def repo_info(self, *args, **options):
        return super().repo_info(*args, timeout=constants.HF_HUB_ETAG_TIMEOUT, **options)


@functools.cache
def _commit(repository: str, revision: str | None) -> str:
    api, offline = _Api(), huggingface_hub.is_offline_mode()
    commit = api.resolve_revision(repository, revision=revision, local_files_only=offline).resolved
    if commit == revision and not offline and _sizes(repository, commit) is None:
        api.repo_info(repository, revision=commit)  # fails at once; listing the files would retry for minutes
    return commit


def _listed(repository: str, commit: str) -> tuple[Path, dict[str, int]]:
    """(cache directory of a commit, with the files of `FIRST`; {name: bytes} of the repository's files)."""
    no_bars = functools.partial(tqdm, disable=True)  # the library shows this progress bar even without a terminal
    snapshot = huggingface_hub.snapshot_download(
        repository, revision=commit, allow_patterns=list(FIRST), tqdm_class=no_bars
    )
    directory = Path(snapshot)
    sizes = _sizes(repository, commit)
    if sizes is None:  # offline, and the files were downloaded one by one by another program
        sizes = {path.name: path.stat().st_size for path in directory.iterdir()}
    return directory, sizes


def _sizes(repository: str, commit: str) -> dict[str, int] | None:
    """{name: bytes} of the files of a commit; None if the cache does not have that list."""
    try:
        files = huggingface_hub.get_cached_repo_tree(repository, revision=commit)
    except errors.CachedRepoTreeNotFoundError:
        return None
    return {file.path: file.size for file in files}


def _weights(repository: str, commit: str, sizes: dict[str, int]) -> list[str]:
    """The names of the weight files: the first that the readers accept and, for an index, the files that it lists."""
    kinds = ("model.safetensors",) if "manifest.json" in sizes else convert.WEIGHTS
    first = next((name for name in kinds if name in sizes), None)
    if first is None:
        raise ValueError(
            f"{repository} at {commit[:8]} has no supported weights ({', '.join(kinds)}); use another revision, or load it "
            f"with transformers, save it with save_pretrained('DIR') and set base=DIR"
        )
    if not first.endswith(".index.json"):
        return [first]
    index = _download(repository, commit, first)
    with _unusable(repository, commit):
        with files.reading(index, "is not an index of weights"):
            shards = sorted(set(files.read_json(index)["weight_map"].values()))
        for name in shards:
            files.beside(index.parent, name)
            if name not in sizes:
                raise ValueError(f"{first} lists {name}, which is not in the repository; use another revision")
    return [first, *shards]


@contextlib.contextmanager
def _unusable(repository: str, commit: str) -> Iterator[None]:
    """Prefix errors about the content of files with the repository."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{repository} at {commit[:8]} cannot be used: {error}") from error


def _download(repository: str, commit: str, name: str) -> Path:
    """The path of a file in the cache, downloaded if it is missing."""
    with _explained(repository, commit):
        return Path(huggingface_hub.hf_hub_download(repository, name, revision=commit))


@contextlib.contextmanager
def _explained(repository: str, revision: str | None) -> Iterator[None]:
    """Turn errors of the library into a one-line ValueError; disk errors propagate."""
    try:
        yield
    except Exception as error:  # of the library, its HTTP client or its transfer library, without a common base class
        if signals.is_transient(error) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise ValueError(_reason(repository, revision, error)) from error


def _reason(repository: str, revision: str | None, error: Exception) -> str:
    """What went wrong and what to do."""
    page, login = f"https://huggingface.co/{repository}", "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):  # a RepositoryNotFoundError too
        return f"{repository} is gated: accept its licence at {page}, then {login}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repository} is not a local directory, and the Hugging Face hub has no repository of that name or it is "
            f"private; check the name, or {login}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision {revision!r}; {page}/tree/main lists its branches and tags"
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
        return f"the Hugging Face hub rejected the token that is set; {login} to a valid one"
    at = "" if revision is None else f" --revision {revision}"
    elsewhere = f"`hf download {repository}{at} --local-dir DIR`"
    if huggingface_hub.is_offline_mode():
        return (
            f"{repository}{f' at {revision}' if revision else ''} is not a local directory, and not all of it is in the cache "
            f"{constants.HF_HUB_CACHE}; unset HF_HUB_OFFLINE, or run {elsewhere} on a machine with a network and set base=DIR"
        )
    first_line = str(error.__cause__ or error).strip().partition("\n")[0]
    return (
        f"{repository} is not a local directory and cannot be downloaded ({first_line:.200}); run {elsewhere} on a machine "
        f"with a network, copy DIR here and set base=DIR"
    )
