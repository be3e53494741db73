"""Files behind URLs: what is there, and each of them fetched whole into a local file.

Belongs here: finding files behind any URL that fsspec knows, whether their names may be trusted, and what the faults of
servers mean.
Does not belong here: what a file must be to be staged (`staging.py`), the landing Volume (`volumes/`), Dagster.

Servers are not trusted: names that lead elsewhere are refused, everything that is read has a limit, and a file counts
as fetched only if it is whole and did not change meanwhile. Credentials in a URL are used and never shown. Object
stores are read as `TELEMATICS_HOME` is, with the same credentials; everything else is fsspec's, with its own settings.

https://filesystem-spec.readthedocs.io/en/latest/api.html#other-known-implementations
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib.metadata import metadata
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import unquote, urljoin, urlsplit

from telematics_assets.errors import (
    FileChangedError,
    MissingExtraError,
    SourceUnavailableError,
    StagingError,
    TelematicsError,
    TransientError,
    UnknownNameError,
    VolumeUnavailableError,
)
from telematics_assets.remote_faults import CONTROL, PassingError, printable, secrets_of, shown, told
from telematics_assets.volumes.base import refuse_dbfs

if TYPE_CHECKING:
    from telematics_assets.volumes.objects import ObjectVolume

_T = TypeVar("_T")

_PIECE = 1 << 20
_WEB = ("http", "https")
_OBJECTS = ("abfss", "az", "gs", "s3")
#: Schemes of this package's extra `urls`.
_OURS = (*_WEB, "github")
#: What changes with a file's content, by the names of fsspec's implementations.
_TAGS = ("size", "ETag", "etag", "Last-Modified", "LastModified", "mtime", "modified", "created", "Content-MD5", "md5")


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is read of a server, and how long it is waited for.

    Attributes:
        file_bytes: Largest file.
        page_bytes: Largest page that lists a folder.
        folders: Most folders below one source.
        depth: Deepest folder below one source.
        attempts: How often a file or a listing is asked for before a passing fault counts.
        backoff_seconds: Wait before the second attempt; it doubles each time.
        connect_seconds: Longest wait for a connection.
        read_seconds: Longest wait for the next bytes.
        total_seconds: Longest time of one attempt.
    """

    file_bytes: int = 4 << 30
    page_bytes: int = 16 << 20
    folders: int = 10_000
    depth: int = 32
    attempts: int = 4
    backoff_seconds: float = 0.5
    connect_seconds: float = 10.0
    read_seconds: float = 30.0
    total_seconds: float = 3600.0


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file that was found behind a URL.

    Attributes:
        name: Where it is, without credentials.
        relative: Its path relative to the source, or its name if it is the source.
        fetch: Writes its content; it is not asked for before.
    """

    name: str
    relative: str
    fetch: Callable[[IO[bytes]], None]


@dataclass(frozen=True, slots=True)
class RemoteProblem:
    """Something behind a URL that can't be a file, or not be listed.

    Attributes:
        name: Where it is, without credentials.
        error: Why.
    """

    name: str
    error: TelematicsError


class Source(Protocol):
    """A URL that files can be asked of."""

    def files(self) -> Iterator[RemoteFile | RemoteProblem]:
        """Every file behind it, in the order of their names; hidden names are passed over."""
        ...


def is_url(text: str) -> bool:
    """Whether a source is a URL, or a chain of them, and no path."""
    return "://" in text


def open_source(url: str, limits: Limits) -> Source:
    """Understand a URL; nothing is asked of its server yet.

    Args:
        url: A URL of fsspec's, perhaps chained (`zip://folder::https://…`).
        limits: What to expect of servers at most.

    Raises:
        DbfsDisabledError: If it is on DBFS.
        MissingExtraError: If its library is not installed.
        UnknownNameError: If its scheme is unknown, or the URL names nothing.
    """
    schemes = []
    for part in url.split("::"):
        refuse_dbfs(part.partition("file://")[2] or part)
        scheme, separator, _ = part.partition("://")
        schemes.append(scheme.lower() if separator else "file")
    if len(schemes) == 1 and schemes[0] in _OBJECTS:
        return _Objects(url, limits)
    try:
        import fsspec
    except ImportError as error:
        raise MissingExtraError("A URL as a source", "urls") from error
    for scheme in schemes:
        _check_library(fsspec, scheme)
    if len(schemes) == 1 and schemes[0] in _WEB:
        if not _names_a_host(url):
            raise UnknownNameError(
                f"{shown(url)!r} names no host. Give a URL such as https://host/folder/file.json; in a password, "
                "encode everything but letters and digits, as in %2F."
            )
        return _Web(url, limits)
    return _Others(url, limits, schemes)


def _names_a_host(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _check_library(fsspec: Any, scheme: str) -> None:
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        raise UnknownNameError(
            f"{scheme!r} is no kind of URL that files can be staged from. Give a local path, or a URL that fsspec "
            "knows, such as https://, github://owner:repo@ref/folder, s3:// or zip://."
        ) from None
    except ImportError as error:
        if scheme in _OURS:
            raise MissingExtraError(f"A source at {scheme}://", "urls") from error
        extras = metadata("fsspec").get_all("Provides-Extra") or ()
        how = f'Run: pip install "fsspec[{scheme}]"' if scheme in extras else str(error)
        raise UnknownNameError(f"A source at {scheme}:// needs a library that is not installed. {how}") from error


class _Patient:
    """What all kinds of sources share: limits, patience, and errors that tell no secret."""

    def __init__(self, url: str, limits: Limits) -> None:
        self._url = url
        self._limits = limits
        self._secrets = secrets_of(url)

    def _patiently(self, action: Callable[[], _T]) -> _T:
        """Do something, and again after a passing fault."""
        for attempt in range(1, self._limits.attempts + 1):
            try:
                with self._telling():
                    return action()
            except PassingError as fault:
                if attempt == self._limits.attempts:
                    raise SourceUnavailableError(
                        f"{fault} ({attempt} attempts). It may go through later: stage it again."
                    ) from None
                wait = self._limits.backoff_seconds * 2 ** (attempt - 1)
                time.sleep(max(wait, min(fault.wait_seconds, self._limits.read_seconds)))
        raise AssertionError("the last attempt decides")

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Raise this package's own errors for those of whatever library stands behind a URL."""
        try:
            yield
        except TelematicsError:
            raise
        except Exception as error:  # noqa: BLE001 - any library may stand behind a URL, and its errors may hold secrets
            failure = told(error, self._secrets)
        else:
            return
        # Not from the library's error: a traceback would show it.
        raise failure

    def _copy(self, source: IO[bytes], into: IO[bytes]) -> int:
        """Write what is left of an open source; how much it was."""
        bounded = _Bounded(into, self._limits.file_bytes)
        while piece := source.read(_PIECE):
            bounded.write(piece)
        return bounded.written


class _Tree(_Patient):
    """A source whose folders are listed one by one."""

    def _entries(self, at: str) -> list[_Entry]:
        raise NotImplementedError

    def _fetcher(self, entry: _Entry) -> Callable[[IO[bytes]], None]:
        raise NotImplementedError

    def _walk(self, root: str) -> Iterator[RemoteFile | RemoteProblem]:
        pending = [(root, "")]
        listed = 0
        while pending:
            at, folder = pending.pop()
            listed += 1
            if listed > self._limits.folders:
                yield RemoteProblem(shown(self._url), StagingError(f"it has more than {self._limits.folders} folders"))
                return
            try:
                entries = self._patiently(lambda at=at: self._entries(at))  # type: ignore[misc]
            except (TransientError, StagingError) as error:
                yield RemoteProblem(self._name(folder), error)
                continue
            below = []
            for entry in sorted(entries, key=lambda entry: entry.name):
                relative = f"{folder}/{entry.name}".lstrip("/")
                if problem := name_problem(entry.name):
                    yield RemoteProblem(self._name(relative), StagingError(problem))
                elif entry.name[0] in "_.":
                    continue
                elif not entry.folder:
                    yield RemoteFile(self._name(relative), relative, self._fetcher(entry))
                elif relative.count("/") >= self._limits.depth:
                    problem = f"its folders are more than {self._limits.depth} deep"
                    yield RemoteProblem(self._name(relative), StagingError(problem))
                else:
                    below.append((entry.at, relative))
            pending += reversed(below)

    def _name(self, relative: str) -> str:
        if not relative:
            return shown(self._url)
        first, chain, rest = self._url.partition("::")
        bare = first if first.endswith("://") else first.partition("?")[0].rstrip("/") + "/"
        return shown(bare) + printable(relative) + chain + shown(rest)


@dataclass(frozen=True, slots=True)
class _Entry:
    """Something in a folder.

    Attributes:
        name: Its name there, decoded.
        at: How it is asked for.
        folder: Whether it is a folder.
        blob: Git's name for its content, where that is known.
    """

    name: str
    at: str
    folder: bool
    blob: str | None = None


class _Web(_Tree):
    """A file on a web server, or, if the path ends with `/`, the files that a page links to."""

    def __init__(self, url: str, limits: Limits) -> None:
        super().__init__(url, limits)
        self._parts = urlsplit(url)
        self._opened: Any = None

    def files(self) -> Iterator[RemoteFile | RemoteProblem]:
        """See `Source.files`."""
        path = self._parts.path
        if path.endswith("/") or not path:
            yield from self._walk(self._url)
            return
        name = _decoded(path.rpartition("/")[2])
        if problem := name_problem(name):
            yield RemoteProblem(shown(self._url), StagingError(problem))
        else:
            yield RemoteFile(shown(self._url), name, self._fetcher(_Entry(name, self._url, False)))

    def _entries(self, at: str) -> list[_Entry]:
        with tempfile.TemporaryFile() as page:
            self._get(at, _Bounded(page, self._limits.page_bytes))
            page.seek(0)
            links = _Links()
            links.feed(page.read().decode("utf-8", "replace"))
        base = urlsplit(at)
        folder = base.path if base.path.endswith("/") else base.path + "/"
        found: dict[str, _Entry] = {}
        for link in links.found:
            raw = _below(link, at, folder)
            if not raw:
                continue
            name, slash, _ = raw.partition("/")
            query = urlsplit(link).query or base.query
            child = base._replace(path=folder + name + slash, query=query, fragment="").geturl()
            decoded = _decoded(name)
            found.setdefault(decoded + slash, _Entry(decoded, child, bool(slash)))
        return list(found.values())

    def _fetcher(self, entry: _Entry) -> Callable[[IO[bytes]], None]:
        return lambda into: self._patiently(lambda: self._fetch(entry.at, into))

    def _fetch(self, url: str, into: IO[bytes]) -> None:
        _empty(into)
        before = self._tags(url)
        received = self._get(url, _Bounded(into, self._limits.file_bytes))
        _check_same(before, self._tags(url), received)

    def _get(self, url: str, into: _Bounded) -> int:
        from fsspec.callbacks import Callback

        class Announced(Callback):  # type: ignore[misc]
            def set_size(self, size: int | None) -> None:
                into.expect(size)

        self._fs().get_file(url, into, callback=Announced())
        return into.written

    def _tags(self, url: str) -> Mapping[str, Any]:
        return _tags(self._fs().info(url))

    def _fs(self) -> Any:
        if self._opened is None:
            import fsspec

            self._opened = fsspec.filesystem(self._parts.scheme, **_web_options(self._parts.scheme, self._limits))
        return self._opened


class _Others(_Tree):
    """Whatever else fsspec knows: repositories, archives, memory, chains of them."""

    def __init__(self, url: str, limits: Limits, schemes: list[str]) -> None:
        super().__init__(url, limits)
        self._schemes = schemes
        self._opened: Any = None
        self._root = ""

    def files(self) -> Iterator[RemoteFile | RemoteProblem]:
        """See `Source.files`."""
        try:
            info = self._patiently(self._open)
        except TelematicsError as error:
            yield RemoteProblem(shown(self._url), error)
            return
        if info["type"] == "directory":
            yield from self._walk(self._root)
            return
        name = self._root.rstrip("/").rpartition("/")[2]
        if problem := name_problem(name):
            yield RemoteProblem(shown(self._url), StagingError(problem))
        else:
            entry = _Entry(name, self._root, False, info.get("sha"))
            yield RemoteFile(shown(self._url), name, self._fetcher(entry))

    def _open(self) -> Mapping[str, Any]:
        import fsspec

        web = {scheme: _web_options(scheme, self._limits) for scheme in self._schemes if scheme in _WEB}
        self._opened, self._root = fsspec.url_to_fs(self._url, skip_instance_cache=True, **web)
        info: Mapping[str, Any] = self._opened.info(self._root)
        return info

    def _entries(self, at: str) -> list[_Entry]:
        entries = []
        for found in self._opened.ls(at, detail=True):
            path = found["name"]
            name = path.rstrip("/").rpartition("/")[2]
            if path.strip("/") != at.strip("/"):
                entries.append(_Entry(name, path, found["type"] == "directory", found.get("sha")))
        return entries

    def _fetcher(self, entry: _Entry) -> Callable[[IO[bytes]], None]:
        return lambda into: self._patiently(lambda: self._fetch(entry, into))

    def _fetch(self, entry: _Entry, into: IO[bytes]) -> None:
        _empty(into)
        # A repository names each content, so nothing has to be asked twice: its answers are counted.
        before = None if entry.blob else _tags(self._opened.info(entry.at))
        with self._opened.open(entry.at, "rb") as source:
            received = self._copy(source, into)
        if entry.blob:
            _check_blob(entry.blob, into, received)
        if before is not None:
            self._opened.invalidate_cache()
            _check_same(before, _tags(self._opened.info(entry.at)), received)


class _Objects(_Patient):
    """Objects of a store that could also be `TELEMATICS_HOME`."""

    def __init__(self, url: str, limits: Limits) -> None:
        super().__init__(url, limits)
        parts = urlsplit(url)
        self._path = parts.path.strip("/")
        if not parts.netloc or not self._path or parts.query:
            raise UnknownNameError(
                f"{shown(url)!r} names no file or folder. Give a path in the store, such as s3://bucket/folder; "
                "credentials are read from the environment."
            )
        from telematics_assets.volumes.objects import ObjectVolume

        place = f"{parts.scheme}://{parts.netloc}"
        self._volume: ObjectVolume = ObjectVolume(place, place, patience_seconds=limits.read_seconds)

    def files(self) -> Iterator[RemoteFile | RemoteProblem]:
        """See `Source.files`."""
        try:
            with self._asking():
                if not self._url.endswith("/") and self._volume.stat(self._path):
                    paths = [self._path]
                else:
                    paths = sorted(self._volume.scan(self._path).files["path"])
        except TelematicsError as error:
            yield RemoteProblem(self._url, error)
            return
        if not paths:
            yield RemoteProblem(self._url, StagingError("there is no such object, and no folder with objects"))
        for path in paths:
            relative = path[len(self._path) :].lstrip("/") or path.rpartition("/")[2]
            yield RemoteFile(f"{self._volume.uri}/{path}", relative, self._fetcher(path))

    def _fetcher(self, path: str) -> Callable[[IO[bytes]], None]:
        def fetch(into: IO[bytes]) -> None:
            with self._asking(), self._volume.open(path) as source:
                self._copy(source, into)

        return fetch

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """A store that gives files is not the one that takes them: only this file waits for it."""
        try:
            with self._telling():
                yield
        except VolumeUnavailableError as error:
            raise SourceUnavailableError(str(error)) from error


class _Bounded:
    """A file that takes no more than so many bytes."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file = file
        self._limit = limit
        self.written = 0

    def expect(self, size: int | None) -> None:
        """Refuse a size before any of it has come."""
        if size is not None and size > self._limit:
            raise StagingError(
                f"it is larger than {self._limit:,} bytes, or has no end. Download it and stage the local file."
            )

    def write(self, data: bytes) -> int:
        self.expect(self.written + len(data))
        try:
            self._file.write(data)
        except OSError as error:
            raise SourceUnavailableError(
                f"it can't be kept in the temporary folder {tempfile.gettempdir()}: {error.strerror or error}. Make "
                "room there, or set TMPDIR to another folder."
            ) from error
        self.written += len(data)
        return len(data)

    # fsspec takes what has these for a file.
    def read(self, size: int = -1) -> bytes:
        raise NotImplementedError

    def tell(self) -> int:
        return self.written

    def close(self) -> None:
        """Leave the file open: whoever opened it closes it."""


class _Links(HTMLParser):
    """The targets of a page's links."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value.strip() for name, value in attrs if name == "href" and value]


def name_problem(name: str) -> str | None:
    """Why a name that a server gave can't be one part of a path, or None."""
    if name in ("", ".", ".."):
        return "its name leads out of its folder; rename it"
    if "/" in name or CONTROL.search(name):
        return "its name holds a slash or a control character; rename it"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8; rename it"
    return None


def _below(link: str, at: str, folder: str) -> str:
    """The part of a link below the folder that shows it, still encoded; empty for links that lead elsewhere."""
    try:
        given, target, base = urlsplit(link), urlsplit(urljoin(at, link)), urlsplit(at)
    except ValueError:
        return ""
    steps = [_decoded(part) for part in given.path.split("/") if part]
    if not given.scheme and not given.netloc and ".." in steps and set(steps) != {".."}:
        # Not the usual way to the folder above, but a name that wants to be elsewhere.
        return "%2E%2E"
    if target.scheme not in _WEB or (target.hostname, target.port) != (base.hostname, base.port):
        return ""
    return target.path.removeprefix(folder) if target.path.startswith(folder) else ""


def _decoded(part: str) -> str:
    return unquote(part, errors="surrogateescape")


def _tags(info: Mapping[str, Any]) -> Mapping[str, Any]:
    return {tag: info[tag] for tag in _TAGS if info.get(tag) is not None}


def _check_same(before: Mapping[str, Any], after: Mapping[str, Any], received: int) -> None:
    if before != after:
        raise FileChangedError("it changed while it was being staged; stage it again when its writer is done")
    if before.get("size", received) != received:
        raise PassingError(f"{received:,} bytes came, and {before['size']:,} were announced")


def _check_blob(blob: str, file: IO[bytes], size: int) -> None:
    """Compare a content with Git's name for it, or for the pointer that large files have in its place."""
    plain = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    large = hashlib.sha256()
    file.seek(0)
    while piece := file.read(_PIECE):
        plain.update(piece)
        large.update(piece)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{large.hexdigest()}\nsize {size}\n".encode()
    pointed = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer, usedforsecurity=False)
    if blob not in (plain.hexdigest(), pointed.hexdigest()):
        raise FileChangedError(
            "it is not what was listed: the branch moved while it was being staged. Stage it again, or name a commit."
        )


def _empty(file: IO[bytes]) -> None:
    """Begin anew after an attempt that came half-way."""
    file.seek(0)
    file.truncate()


def _web_options(scheme: str, limits: Limits) -> dict[str, Any]:
    import aiohttp
    from fsspec.config import conf

    headers = conf.get(scheme, {}).get("headers", {})
    return {
        "skip_instance_cache": True,
        # The bytes as they are kept there, so that their number can be compared.
        "headers": {**headers, "Accept-Encoding": "identity"},
        "timeout": aiohttp.ClientTimeout(
            total=limits.total_seconds, sock_connect=limits.connect_seconds, sock_read=limits.read_seconds
        ),
    }
