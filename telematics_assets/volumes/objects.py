"""A Volume in an object store: Azure Data Lake Storage, Amazon S3 or Google Cloud Storage, by obstore.

Belongs here: opening a store by its URL, listing, reading and publishing objects, and what a store's errors mean.
Does not belong here: what the files mean, tables (`lakehouse/stores.py`).

Publication is the store's own conditional put. A put whose answer is lost may have succeeded all the same, so every
object carries its writer's id, which is read back after a conflict or a lost answer. Credentials, account, region and
endpoint come from the environment as obstore reads it. Google Cloud Storage runs by the same code, but untested.
"""

from __future__ import annotations

import io
import mmap
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

import polars as pl

from telematics_assets.errors import (
    FileChangedError,
    FileMissingError,
    MissingExtraError,
    TelematicsError,
    VolumeError,
    VolumeUnavailableError,
)
from telematics_assets.volumes.base import FileEntry, Listing, check_path

try:
    import obstore
    from obstore import exceptions
    from obstore.store import from_url
except ImportError as error:
    raise MissingExtraError("An object store", "objects") from error

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig, S3Config
    from typing_extensions import Buffer

Listed = TypeVar("Listed")

#: How long one call goes on trying, seconds.
PATIENCE_SECONDS = 30.0
#: How often a request is sent again within that time.
MAX_RETRIES = 6
#: Longest time to wait for a connection, and for the next bytes of an answer, seconds.
CONNECT_SECONDS, READ_SECONDS = 5.0, 20.0
#: Longest time of one request, seconds; a large upload is one request.
REQUEST_SECONDS = 600.0
#: The same for tables, whose data files are sent and fetched in small parts.
TABLE_REQUEST_SECONDS = 60.0
#: Bytes asked for at once by small reads; larger reads ask for what they need.
READ_AHEAD = 4 << 20

#: How often a put or a delete without an answer is sent; obstore itself repeats only requests that change nothing.
_ATTEMPTS = 3
#: Between two tries to list, seconds.
_PAUSE_SECONDS = 0.5
_WRITER = "telematicswriter"
_LISTED = {"path": pl.String(), "size": pl.Int64(), "last_modified": pl.Datetime("us", "UTC"), "e_tag": pl.String()}
_LISTED_AT_ONCE = 1000
#: Small objects that are asked for at the same time.
_READ_AT_ONCE = 16

#: Which environment variables hold the credentials, by the URL's scheme.
_CREDENTIALS = {
    "abfss": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_KEY, or AZURE_CLIENT_ID, "
    "AZURE_TENANT_ID and AZURE_CLIENT_SECRET",
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN if they are temporary, and AWS_REGION",
    "gs": "GOOGLE_SERVICE_ACCOUNT (path of the key file), or GOOGLE_APPLICATION_CREDENTIALS",
}
_CREDENTIALS |= {"az": _CREDENTIALS["abfss"]}
#: Schemes of the URLs that this module opens.
SCHEMES = tuple(_CREDENTIALS)

#: What obstore, and polars when it reads a store, raise.
STORE_ERRORS = (exceptions.BaseError, OSError, pl.exceptions.PolarsError)

# S3 says that a token has expired with status 400; without a body, if it was asked by HEAD.
_REFUSED = re.compile(
    r"status(?: code)?:? 40[13]\b|HEAD http\S+ in \S+ - .* 400 |necessary privileges|valid authentication credentials|"
    r"ExpiredToken|TokenRefreshRequired|InvalidAccessKeyId|SignatureDoesNotMatch|InvalidToken"
    r"|AuthenticationFailed|AuthorizationFailure|NoAuthenticationInformation|169\.254\.169\.254|Missing\w*(?:Key|Account)",
    re.IGNORECASE,
)
_OF_A_STORE = re.compile(r"Generic (?:MicrosoftAzure|S3|GCS) error|Error performing [A-Z]+ https?:|[Oo]bject[ -]store")
_NO_STORE = re.compile(r"NoSuchBucket|ContainerNotFound|container does not exist", re.IGNORECASE)
_PERMANENT = re.compile(r"status(?: code)?:? 4(?!08|09|29)\d\d\b")


def open_store(url: str, patience_seconds: float = PATIENCE_SECONDS) -> ObjectStore:
    """Open the store behind a URL; nothing is sent yet.

    Args:
        url: `abfss://container@account.dfs.core.windows.net/path`, `az://container/path`, `s3://bucket/path` or
            `gs://bucket/path`.
        patience_seconds: How long one call goes on trying.

    Raises:
        VolumeError: If the environment lacks what the store needs, or the URL is none.
    """
    client: ClientConfig = {
        # Plain HTTP is spoken only to an endpoint that the environment names so.
        "allow_http": True,
        "connect_timeout": timedelta(seconds=min(CONNECT_SECONDS, patience_seconds)),
        "read_timeout": timedelta(seconds=min(READ_SECONDS, patience_seconds)),
        "timeout": timedelta(seconds=REQUEST_SECONDS),
    }
    retry: RetryConfig = {"max_retries": MAX_RETRIES, "retry_timeout": timedelta(seconds=patience_seconds)}
    config = {"aws_conditional_put": "etag"} if url.startswith("s3:") else {}
    try:
        return from_url(url, config=cast("S3Config", config), client_options=client, retry_config=retry)
    except (exceptions.BaseError, ValueError) as error:
        raise translate(error, url) from error


def storage_options(url: str, patience_seconds: float = PATIENCE_SECONDS) -> dict[str, str]:
    """What delta-rs is told of a URL's store beyond what it reads from the environment itself."""
    options = {
        "allow_http": "true",
        "connect_timeout": f"{min(CONNECT_SECONDS, patience_seconds):g}s",
        "timeout": f"{TABLE_REQUEST_SECONDS:g}s",
        "max_retries": str(MAX_RETRIES),
        "retry_timeout": f"{patience_seconds:g}s",
    }
    return options | ({"aws_conditional_put": "etag"} if url.startswith("s3:") else {})


def polars_options(patience_seconds: float = PATIENCE_SECONDS) -> dict[str, Any]:
    """What polars is told of a store beyond what it reads from the environment itself."""
    return {
        "allow_http": "true",
        "connect_timeout": f"{min(CONNECT_SECONDS, patience_seconds):g}s",
        "timeout": f"{TABLE_REQUEST_SECONDS:g}s",
        "max_retries": MAX_RETRIES,
        "retry_timeout_ms": int(patience_seconds * 1000),
    }


def is_of_a_store(error: Exception) -> bool:
    """Whether an error of delta-rs or polars came from the object store."""
    return _OF_A_STORE.search(str(error)) is not None


@contextmanager
def translating(url: str) -> Iterator[None]:
    """Raise the package's own errors for those of a store.

    Args:
        url: What is asked for.
    """
    try:
        yield
    except STORE_ERRORS as error:
        raise translate(error, url) from error


def translate(error: Exception, url: str) -> TelematicsError:
    """The package's own error for what a store, or the library that talks to it, said.

    Args:
        error: Of obstore, deltalake or polars.
        url: What was asked for.
    """
    text = _flat(str(error))
    scheme = url.partition(":")[0]
    if _NO_STORE.search(text):
        return _no_store(url)
    refused = isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError)
    if refused or _REFUSED.search(text):
        known = _CREDENTIALS.get(scheme, "")
        return VolumeError(
            f"{url}: the store refused the credentials, or there are none, or they have expired. They are read from "
            f"the environment: {known}. Set valid ones that may list, read, write and delete there."
        )
    if isinstance(error, FileNotFoundError):
        return FileMissingError(f"{url} does not exist. List the folder to see what is there.")
    if isinstance(error, exceptions.PreconditionError):
        return FileChangedError(f"{url} changed while it was read. It is discovered again.")
    if isinstance(error, exceptions.InvalidPathError | ValueError) or _PERMANENT.search(text):
        return VolumeError(f"{url}: {one_line(text)}. Check the name and the settings of the store.")
    return VolumeUnavailableError(f"{url}: {one_line(text)}. It may go through later.")


def _no_store(url: str) -> VolumeError:
    return VolumeError(f"{url}: the bucket or container does not exist. Create it, or correct TELEMATICS_HOME.")


def one_line(text: str) -> str:
    """What a library said, on one line, without the queries of URLs: they may hold signatures."""
    shown = _flat(text.partition("Debug source")[0])
    return re.sub(r"(https?://[^\s?\"')]*)\?[^\s\"')]*", r"\1", shown).rstrip(".")[:400]


def _flat(text: str) -> str:
    # delta-rs breaks its errors into coloured lines.
    return " ".join(re.sub(r"\x1b\[\d*m|↳", "", text).split())


class ObjectVolume:
    """A Volume that mirrors `/Volumes/<catalog>/<schema>/<volume>` below a URL of an object store.

    Modification times are whole seconds, as HTTP tells them, and always those of the store; the ETag tells one content
    from another within a second. Names with control characters can't be used, and on Azure names with a backslash.
    """

    def __init__(self, url: str, location: str, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
        """Use a URL as a Volume; nothing is sent yet.

        Args:
            url: See `open_store`.
            location: The Volume's name as a path.
            patience_seconds: How long one call goes on trying before it raises `VolumeUnavailableError`.

        Raises:
            VolumeError: If the environment lacks what the store needs.
        """
        self._url = url.rstrip("/")
        self.location = location
        self._patience = patience_seconds
        self._store = open_store(self._url, patience_seconds)
        # Zero bytes that are a marker of a folder, not a file: decided once per path and ETag.
        self._markers: dict[tuple[str, str | None], bool] = {}

    @property
    def uri(self) -> str:
        """The URL."""
        return self._url

    def scan(self, folder: str, from_path: str = "") -> Listing:
        """See `Volume.scan`.

        Raises:
            VolumeError: Also if a name below the folder has a control character or an empty part: obstore then can't
                tell which other names stand beside it, so nothing is listed and the name is told.
        """
        self._key(folder)
        # A store begins behind an offset: one that is a character shorter sorts just before.
        offset = from_path[:-1].rstrip("/") or None

        def pages() -> list[pl.DataFrame]:
            found = obstore.list(self._store, folder, offset=offset, chunk_size=_LISTED_AT_ONCE, return_arrow=True)
            return [
                pl.DataFrame(page).select(pl.col(name).cast(kind) for name, kind in _LISTED.items()) for page in found
            ]

        frames = [pl.DataFrame(schema=_LISTED), *self._listed(pages, folder)]
        rest = pl.col("path").str.slice(len(folder) + 1)
        files = pl.concat(frames).filter(~rest.str.contains(r"(?:^|/)[_.]"))
        files = files.select(
            pl.col("path"),
            pl.col("size"),
            (pl.col("last_modified").dt.epoch("s") * 1_000_000_000).alias("modified_ns"),
            pl.col("e_tag").str.strip_chars('"').alias("etag"),
        )
        return Listing(self._without_markers(files, whole=offset is None))

    def names(self, folder: str) -> list[str]:
        """See `Volume.names`."""
        self._key(folder)
        found = self._listed(lambda: obstore.list_with_delimiter(self._store, folder)["objects"], folder)
        return sorted(entry["path"][len(folder) + 1 :] for entry in found)

    def stat(self, path: str) -> FileEntry | None:
        """See `Volume.stat`."""
        key = self._key(path)
        try:
            found = obstore.head(self._store, key)
        except FileNotFoundError:
            return None
        except exceptions.BaseError as error:
            raise translate(error, self._at(path)) from error
        return FileEntry(path, found["size"], _nanoseconds(found["last_modified"]), _etag(found["e_tag"]))

    @contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        """See `Volume.open`. All reads are of the one content that was there first."""
        key = self._key(path)
        try:
            found = obstore.head(self._store, key)
        except (exceptions.BaseError, OSError) as error:
            raise translate(error, self._at(path)) from error
        raw = _Ranges(self._store, key, self._at(path), found["size"], found["e_tag"])
        with io.BufferedReader(raw, READ_AHEAD) as source:
            yield source

    def read(self, path: str) -> bytes:
        """See `Volume.read`."""
        key = self._key(path)
        try:
            return bytes(obstore.get(self._store, key).bytes())
        except (exceptions.BaseError, OSError) as error:
            raise translate(error, self._at(path)) from error

    def read_unchanged(self, files: Sequence[FileEntry]) -> list[bytes | None]:
        """See `Volume.read_unchanged`.

        Raises:
            VolumeUnavailableError: If the store does not answer.
        """
        pool = ThreadPoolExecutor(_READ_AT_ONCE, thread_name_prefix="objects")
        try:
            return list(pool.map(self._unchanged, files))
        finally:
            pool.shutdown(cancel_futures=True)

    def create(self, path: str, data: bytes) -> bool:
        """See `Volume.create`."""
        return self._publish(path, data)

    def upload(self, path: str, source: BinaryIO, *, modified_ns: int | None = None) -> bool:
        """See `Volume.upload`. The store gives the modification time; the file passes through a local temporary one."""
        check_path(path)
        # One conditional put takes the whole content at once; mapped from a file it needs no memory.
        with tempfile.TemporaryFile() as whole:
            try:
                shutil.copyfileobj(source, whole, 1 << 20)
                whole.flush()
            except OSError as error:
                raise VolumeUnavailableError(
                    f"{self._at(path)}: {error.strerror or error}. It may go through later."
                ) from error
            if not whole.tell():
                return self._publish(path, b"")
            return self._publish(path, mmap.mmap(whole.fileno(), 0, access=mmap.ACCESS_READ))

    def delete(self, path: str) -> None:
        """See `Volume.delete`."""
        key = self._key(path)
        for left in reversed(range(_ATTEMPTS)):
            try:
                with suppress(FileNotFoundError):
                    obstore.delete(self._store, key)
                return
            except exceptions.BaseError as error:
                failure = translate(error, self._at(path))
                if not left or not failure.transient:
                    raise failure from error

    def remove(self, file: FileEntry) -> bool:
        """See `Volume.remove`. obstore has no conditional delete: a write within the same round trip is not seen."""
        if self.stat(file.path) != file:
            return False
        self.delete(file.path)
        return True

    def _unchanged(self, file: FileEntry) -> bytes | None:
        key = self._key(file.path)
        try:
            answer = obstore.get(self._store, key)
            meta = answer.meta
            tag, modified_ns = _etag(meta["e_tag"]), _nanoseconds(meta["last_modified"])
            # The answer describes the very content that it brings.
            if (meta["size"], modified_ns, tag) != (file.size, file.modified_ns, file.etag):
                return None
            return bytes(answer.bytes())
        except (exceptions.BaseError, OSError) as error:
            failure = translate(error, self._at(file.path))
            if isinstance(failure, VolumeError):
                return None
            raise failure from error

    def _at(self, path: str) -> str:
        return f"{self._url}/{path}"

    def _key(self, path: str) -> str:
        """Validate a path; the store's own key is the same text."""
        check_path(path)
        unfit = "\\" if self._url.startswith(("abfss:", "az:")) else ""
        if any(char < " " or char == "\x7f" or char in unfit for char in path):
            raise VolumeError(
                f"{path!r} is not a path of this Volume: object stores take no control characters in names, and Azure "
                "no backslash. Rename the file."
            )
        return path

    def _publish(self, path: str, data: Buffer) -> bool:
        key = self._key(path)
        writer = uuid.uuid4().hex
        for left in reversed(range(_ATTEMPTS)):
            published = self._put(key, data, writer, last=not left)
            if published is not None:
                return published
        raise AssertionError("the last attempt decides")

    def _put(self, key: str, data: Buffer, writer: str, *, last: bool) -> bool | None:
        """Put an object if there is none: whether it is there by this writer, or None to try again."""
        try:
            obstore.put(self._store, key, data, attributes={_WRITER: writer}, mode="create")
        except exceptions.AlreadyExistsError as error:
            ours = self._is_ours(key, writer)
            if ours is None and last:
                raise VolumeUnavailableError(
                    f"{self._at(key)}: another writer was busy with it, and nothing is there now. It may go through "
                    "later."
                ) from error
            return ours
        except FileNotFoundError as error:
            raise _no_store(self._url) from error
        except exceptions.BaseError as error:
            failure = translate(error, self._at(key))
            # The answer may be lost, but the file there, or about to be: with this writer's id, whichever put it was.
            ours = self._is_ours(key, writer) if failure.transient else None
            if ours is None and (last or not failure.transient):
                raise failure from error
            return ours
        return True

    def _is_ours(self, key: str, writer: str) -> bool | None:
        """Whether the object is of this writer; None if there is none, or the store does not answer."""
        try:
            return obstore.get(self._store, key).attributes.get(_WRITER) == writer
        except FileNotFoundError:
            return None
        except exceptions.BaseError as error:
            raise translate(error, self._at(key)) from error

    def _listed(self, listing: Callable[[], Listed], folder: str) -> Listed:
        """A whole listing. One whose answer breaks off is asked for again: obstore repeats only what never began."""
        patience = time.monotonic() + self._patience
        while True:
            try:
                return listing()
            except FileNotFoundError as error:
                raise _no_store(self._url) from error
            except exceptions.BaseError as error:
                failure = translate(error, self._at(folder))
                if not failure.transient or time.monotonic() + _PAUSE_SECONDS > patience:
                    raise failure from error
            time.sleep(_PAUSE_SECONDS)

    def _without_markers(self, files: pl.DataFrame, *, whole: bool) -> pl.DataFrame:
        empty = files.filter(pl.col("size") == 0)
        markers: dict[tuple[str, str | None], bool] = {} if whole else dict(self._markers)
        if empty.is_empty():
            self._markers = markers
            return files
        for path, etag in empty.select("path", "etag").iter_rows():
            known = self._markers.get((path, etag))
            # `folder/` is listed as `folder`, but there is no object of that name.
            markers[path, etag] = self.stat(path) is None if known is None else known
        self._markers = markers
        return files.filter(~pl.col("path").is_in([path for (path, _), marker in markers.items() if marker]))


class _Ranges(io.RawIOBase):
    """One content of one object, read range by range."""

    def __init__(self, store: ObjectStore, key: str, url: str, size: int, etag: str | None) -> None:
        self._store = store
        self._key = key
        self._url = url
        self._size = size
        self._etag = etag
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._position = base + offset
        return self._position

    def readall(self) -> bytes:
        return self._range(self._size)

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        data = self._range(min(self._position + len(view), self._size))
        view[: len(data)] = data
        return len(data)

    def _range(self, end: int) -> bytes:
        if end <= self._position:
            return b""
        options: dict[str, Any] = {"range": (self._position, end)}
        if self._etag is not None:
            options["if_match"] = self._etag
        try:
            data = bytes(obstore.get(self._store, self._key, options=cast(Any, options)).bytes())
        except (exceptions.BaseError, FileNotFoundError) as error:
            raise translate(error, self._url) from error
        self._position += len(data)
        return data


def _nanoseconds(moment: datetime) -> int:
    return int(moment.timestamp()) * 1_000_000_000


def _etag(tag: str | None) -> str | None:
    # Azure's listings leave out the quotation marks that its headers have.
    return None if tag is None else tag.strip('"')
