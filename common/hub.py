"""Files of the Hugging Face hub: fetched once into its cache, resumed where they stopped, every failure one line.

huggingface_hub keeps the cache and does the authentication. What it (2.4) lacks is added here: it throws a partial
file away when the process ends (17 GB start anew) and loses up to 10 MiB at each dropped connection; it waits for hours
where it is told to, not at all where Retry-After is a date or what a repository holds is asked for; it compares no
SHA-256 and only warns of a full disk. Partial files stay beside the finished ones as <etag>.incomplete, until a later
call goes on with them.
"""

import email.utils
import errno
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # the base class of all errors of the HTTP client that huggingface_hub uses
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (
    WeakFileLock,
    build_hf_headers,
    filter_repo_objects,
    get_session,
    hf_raise_for_status,
    parse_ratelimit_headers,
    tqdm,
    validate_repo_id,
)

from common.errors import UserError

LOCAL_COPY = "or use a local copy (a folder for --dataset or for the model)"
RETRY_SECONDS = (1, 2, 4, 8, 16, 32, 60, 60)  # between tries that brought nothing, where the hub names no time
UNREACHED_TRIES = 3  # before the hub has answered at all: with no network one should know soon
LONGEST_WAIT = 900  # seconds; the hub's own windows are 300
BAR_FROM = 10_000_000  # bytes; a bar for less is noise
TIMEOUT = 10  # seconds for an answer about a file
RETRY_STATUS = (408, 429, 500, 502, 503, 504)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CHUNK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")

_log = logging.getLogger(__name__)
Answer = TypeVar("Answer")


class _NoBar(tqdm):
    """For what takes no time."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **(options | {"disable": True}))


def endpoint() -> str:
    """The hub's address, huggingface.co or what HF_ENDPOINT says."""
    return constants.ENDPOINT


def fetch_file(repo_id: str, filename: str, revision: str | None = None, repo_type: str = "model") -> Path:
    """Path of a hub file in the cache, downloaded if need be, going on with a partial download of earlier.

    Waits as the hub asks on 429, tries again after dropped connections. Raises UserError in one line that says what
    to do. A file that is cached at a full commit id needs no network; where the hub cannot be reached, the cached
    file of a branch is used, with a warning.
    """
    what = f"{filename} of {repo_id}"
    _require_repo_id(repo_id)
    cached = huggingface_hub.try_to_load_from_cache(repo_id, filename, revision=revision, repo_type=repo_type)
    cached_path = Path(cached) if isinstance(cached, str) else None
    if cached_path and (huggingface_hub.is_offline_mode() or (revision and _COMMIT.fullmatch(revision))):
        return cached_path
    try:
        url = hf_hub_url(repo_id, filename, repo_type=repo_type, revision=revision)
        metadata = _patiently(lambda: get_hf_file_metadata(url, timeout=TIMEOUT))
        if metadata.commit_hash is None or metadata.etag is None:
            raise FileMetadataError(f"{endpoint()} does not answer like a Hugging Face hub")
        commit = metadata.commit_hash
        if metadata.size:  # else there is nothing to resume
            _fetch_content(repo_id, filename, repo_type, commit, metadata.etag, metadata.size)
        # The content is in the cache; this enters it under the names by which the cache is searched.
        path = _patiently(lambda: hf_hub_download(repo_id, filename, revision=commit, repo_type=repo_type))
        _remember(repo_id, repo_type, revision, commit)
        return Path(path)
    except (HTTPError, OSError, FileMetadataError) as error:
        if cached_path and _is_unreached(error):
            _log.warning("%s cannot be reached; using the cached %s", endpoint(), what)
            return cached_path
        raise _user_error(error, what) from error


def is_cached(repo_id: str, filenames: Collection[str], revision: str | None = None) -> bool:
    """Whether all these files of a model are in the hub's cache already. The hub is not asked."""
    found = [huggingface_hub.try_to_load_from_cache(repo_id, name, revision=revision) for name in filenames]
    return all(isinstance(path, str) for path in found)


def fetch_model_folder(model: str | os.PathLike, patterns: list[str], revision: str | None = None) -> Path:
    """Folder with a model's files. A local folder is returned as it is; of a hub model only what matches is fetched.

    `patterns` are shell-style ("config.json", "*.safetensors"). Raises UserError where `model` is neither a folder
    nor a hub id, where nothing matches, and as `fetch_file` does.
    """
    model = os.fspath(model)
    if Path(model).expanduser().is_dir():
        return Path(model).expanduser()
    _require_repo_id(model)
    try:
        commit = revision
        if not huggingface_hub.is_offline_mode():
            commit, sizes = _repo_content(model, revision, "model")
            names = list(filter_repo_objects(sizes, allow_patterns=patterns))
            if not names:
                raise UserError(f"{model} on {endpoint()}: expected {' or '.join(patterns)}, found no such file")
            for name in names:
                fetch_file(model, name, revision=commit)
            _remember(model, "model", revision, commit)
        # Everything is cached by now; this keeps the list by which a later call without network knows that.
        return Path(snapshot_download(model, revision=commit, allow_patterns=patterns, tqdm_class=_NoBar))
    except (HTTPError, OSError) as error:
        if _is_unreached(error) and (folder := _cached_folder(model, patterns, revision)):
            _log.warning("%s cannot be reached; using the cached %s", endpoint(), model)
            return folder
        raise _user_error(error, model) from error


def resolved_revision(model: str | os.PathLike, revision: str | None = None, repo_type: str = "model") -> str | None:
    """The commit id (40 hex digits) that a branch, a tag or None (the default branch) means; None for a local folder.

    Where the hub cannot be reached, what the cache knows.
    """
    model = os.fspath(model)
    if repo_type == "model" and Path(model).expanduser().is_dir():
        return None
    _require_repo_id(model)
    if revision and _COMMIT.fullmatch(revision):
        return revision
    known = _reference(model, repo_type, revision)
    try:
        commit, _ = _repo_content(model, revision, repo_type)
        _remember(model, repo_type, revision, commit)
        return commit
    except (HTTPError, OSError) as error:
        if _is_unreached(error) and known.is_file():
            _log.warning("%s cannot be reached; using the cached revision of %s", endpoint(), model)
            return known.read_text().strip()
        raise _user_error(error, model) from error


def file_sizes(
    repo_id: str, patterns: list[str], revision: str | None = None, repo_type: str = "model"
) -> dict[str, int]:
    """Bytes by name of the hub files that match, without fetching them. Raises UserError as `fetch_file` does."""
    _require_repo_id(repo_id)
    try:
        _, sizes = _repo_content(repo_id, revision, repo_type)
    except (HTTPError, OSError) as error:
        raise _user_error(error, repo_id) from error
    return {name: sizes[name] for name in filter_repo_objects(sizes, allow_patterns=patterns)}


def _require_repo_id(name: str) -> None:
    """Raise UserError for a name that cannot be one of the hub's, so that it was meant as a path."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name}: expected a folder, or a hub id such as owner/name; found no such folder") from error
    if Path(name).is_file():
        raise UserError(f"{name}: expected a folder, or a hub id such as owner/name; found a file")


def _repo_content(repo_id: str, revision: str | None, repo_type: str) -> tuple[str, dict[str, int]]:
    """The commit id that a revision of a repository is now, and the bytes of each of its files by name."""
    api = HfApi()
    ask = api.dataset_info if repo_type == "dataset" else api.model_info
    info = _patiently(lambda: ask(repo_id, revision=revision, files_metadata=True, timeout=TIMEOUT))
    if info.sha is None:
        raise FileMetadataError(f"{endpoint()} does not answer like a Hugging Face hub")
    return info.sha, {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}


def _reference(repo_id: str, repo_type: str, revision: str | None) -> Path:
    """Where the cache keeps what a branch meant last, for work without network."""
    folder = repo_folder_name(repo_id=repo_id, repo_type=repo_type)
    return Path(constants.HF_HUB_CACHE, folder, "refs", revision or constants.DEFAULT_REVISION)


def _remember(repo_id: str, repo_type: str, revision: str | None, commit: str) -> None:
    """Keep in the cache what a branch or tag means now."""
    if revision != commit:
        reference = _reference(repo_id, repo_type, revision)
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)


def _cached_folder(model: str, patterns: list[str], revision: str | None) -> Path | None:
    """The model's folder in the cache if it is complete, else None."""
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _fetch_content(repo_id: str, filename: str, repo_type: str, commit: str, etag: str, size: int) -> None:
    """Bring the content of a file into the cache's blobs, unless it is there; one process at a time."""
    url = hf_hub_url(repo_id, filename, repo_type=repo_type, revision=commit)
    repo_folder = repo_folder_name(repo_id=repo_id, repo_type=repo_type)
    lock = Path(constants.HF_HUB_CACHE, ".locks", repo_folder, f"{etag}.lock")
    blob = Path(constants.HF_HUB_CACHE, repo_folder, "blobs", etag)
    for folder in (lock.parent, blob.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if not blob.exists():
            _download(url, blob, size, f"{filename} of {repo_id}")


def _download(url: str, blob: Path, size: int, what: str) -> None:
    """Download to blob's .incomplete file, from where an earlier try stopped; check it and give it its name."""
    partial = blob.with_name(f"{blob.name}.incomplete")
    if _length(partial) > size:  # not of this file
        partial.unlink()
    done, free = _length(partial), shutil.disk_usage(blob.parent).free
    if size - done > free:
        raise UserError(
            f"{what}: {(size - done) / 1e9:.2f} GB are still to be downloaded and {blob.parent} has {free / 1e9:.2f} GB"
            " free; make room, or set HF_HOME to a folder on a larger disk"
        )
    name = Path(what.split(" of ")[0]).name
    with tqdm(total=size, initial=done, unit="B", unit_scale=True, desc=name, disable=size < BAR_FROM) as bar:
        tries = 0
        while done < size:
            try:
                _stream(url, partial, done, bar.update)
            except HTTPError as error:
                _wait_or_raise(error, tries, len(RETRY_SECONDS) + 1)
            before, done = done, _length(partial)
            tries = tries + 1 if done <= before else 0
            if tries > len(RETRY_SECONDS):
                raise UserError(f"{what}: the hub sends only {done:,} of {size:,} bytes; try again later, {LOCAL_COPY}")
            bar.n = done
        bar.set_description(f"checking {name}")
        _check(partial, blob.name, size, what)
    partial.replace(blob)


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _stream(url: str, partial: Path, start: int, count: Callable[[int], object]) -> None:
    """Append what the hub sends from byte `start` on; a hub that ignores the range starts the file anew."""
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        with open(partial, "ab" if start and response.status_code == 206 else "wb") as file:
            for chunk in response.iter_bytes():  # as it comes: a set size would lose the last piece
                file.write(chunk)
                count(len(chunk))


def _check(partial: Path, etag: str, size: int, what: str) -> None:
    """Refuse a file of another size, or of another SHA-256 where the hub's etag is one (all large files)."""
    found = _length(partial)
    sound = found == size
    if sound and _SHA256.fullmatch(etag):
        digest = hashlib.sha256()
        with open(partial, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        sound = digest.hexdigest() == etag
    if not sound:
        partial.unlink()
        raise UserError(f"{what}: what was downloaded is damaged ({found:,} bytes; {size} expected); run it again")


def _patiently(call: Callable[[], Answer]) -> Answer:
    """Call until it works, waiting as the hub asks; few times only while nothing answers at all."""
    tries = 0
    while True:
        try:
            return call()
        except HTTPError as error:
            answered = isinstance(error, HfHubHTTPError)
            _wait_or_raise(error, tries, len(RETRY_SECONDS) + 1 if answered else UNREACHED_TRIES)
            tries += 1


def _wait_or_raise(error: HTTPError, tries: int, most: int) -> None:
    """Sleep before the next try if trying again may help, else raise the error."""
    response = error.response if isinstance(error, HfHubHTTPError) else None
    if (response is not None and response.status_code not in RETRY_STATUS) or tries + 1 >= most:
        raise error
    seconds: float = RETRY_SECONDS[tries]
    if response is not None:
        asked = _asked_seconds(response.headers)
        seconds = seconds if asked is None else asked
        if seconds > LONGEST_WAIT:
            raise error
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    _log.warning("%s: %s; next try in %.0f s", endpoint(), reason, seconds)
    time.sleep(seconds)


def _asked_seconds(headers: Mapping[str, str]) -> float | None:
    """Seconds the hub asks to wait: Retry-After (seconds or a date) or its RateLimit header; None if neither."""
    value = (headers.get("Retry-After") or "").strip()
    if value.isdigit():
        return float(value)
    if value:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return None
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 else None


def _is_unreached(error: Exception) -> bool:
    """Whether the hub gave no answer, as opposed to a refusal."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in RETRY_STATUS
    return isinstance(error, HTTPError | OfflineModeIsEnabled | LocalEntryNotFoundError)


def _user_error(error: Exception, what: str) -> UserError:
    """The one line that a user reads: what failed, why, what to do."""
    hub = endpoint()
    if huggingface_hub.is_offline_mode():
        return UserError(f"{what}: not in the cache and HF_HUB_OFFLINE is set; unset it once to download, {LOCAL_COPY}")
    if isinstance(error, GatedRepoError):
        return UserError(f"{what}: access is gated; accept its terms on {hub}, then `hf auth login`, {LOCAL_COPY}")
    if isinstance(error, RepositoryNotFoundError):
        return UserError(f"{what}: {hub} has no such repository (or it is private); check the name, {LOCAL_COPY}")
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{what}: {hub} has no such revision; check --revision, {LOCAL_COPY}")
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return UserError(f"{what}: {hub} has no such file at this revision; check the name, {LOCAL_COPY}")
    if isinstance(error, HfHubHTTPError):
        code = error.response.status_code
        if code == 429:
            return UserError(
                f"{what}: {hub} still answers 429 Too Many Requests; try later, `hf auth login` for more, {LOCAL_COPY}"
            )
        return UserError(f"{what}: {hub} answers with HTTP status {code}; try again later, {LOCAL_COPY}")
    if isinstance(error, FileMetadataError):
        return UserError(f"{what}: {str(error).splitlines()[0]}; check the name and HF_ENDPOINT, {LOCAL_COPY}")
    if isinstance(error, HTTPError | LocalEntryNotFoundError | OfflineModeIsEnabled):
        cause = str(error.__cause__ or error).strip().split("\n")[0]
        return UserError(f"{what}: {hub} cannot be reached ({cause}); check the network and run again, {LOCAL_COPY}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{what}: {constants.HF_HUB_CACHE} is full; make room, or set HF_HOME; what is here stays")
    return UserError(f"{what}: {error}; {constants.HF_HUB_CACHE} must be a folder that can be written to")
