"""WHAT exists: the names, the file streams, the replicated tables and the table contracts.

Belongs here: three-level names, declarations of streams (with Auto Loader's option names) and of replicated tables, and
table contracts (columns, types, units, comments), from which Delta comments, Dagster metadata, checks and docs are all
fed.
Does not belong here: how anything is read or written, where a deployment keeps it (`settings.py`), Dagster.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, get_args

from telematics_assets.errors import OptionError, UnknownNameError
from telematics_assets.lakehouse.ddl import ACCEPTED, DeltaType, Hint, parse_hints, parse_type
from telematics_assets.volumes.base import check_path
from telematics_assets.volumes.globs import name_pattern

FileFormat = Literal["parquet", "json", "csv"]
SchemaEvolutionMode = Literal["addNewColumns", "rescue", "failOnNewColumns", "none", "addNewColumnsWithTypeWidening"]
IncrementalListing = Literal["auto", "true", "false"]
CleanSource = Literal["OFF", "DELETE", "MOVE"]
ReplicationMode = Literal["row_xid", "xmin", "updated_at", "snapshot"]
DeleteHandling = Literal["tombstones", "sweep", "none"]

#: Columns that every table filled from files ends with: name, type, comment.
SOURCE_FILE = "_source_file"
SOURCE_FILE_MODIFIED_AT = "_source_file_modified_at"
BATCH_ID = "_batch_id"
INGESTED_AT = "_ingested_at"
CORRUPT_RECORD = "_corrupt_record"

# No `%`: delta-rs decodes `%41` in a path and then writes elsewhere.
_NAME = re.compile(r"[^\x00-\x20/\x7f`.%]+")
_OWN_COLUMN = re.compile(r"_[A-Za-z0-9_]+")
_SEPARATOR = re.compile(r"[\t -\x7e]")
_BYTES = re.compile(r"([0-9]{1,15})([kmgtp]?b?)")
_INTERVAL_PART = re.compile(r"([0-9]{1,9}) +(second|minute|hour|day|week)s?\b", re.ASCII)
_UNIT_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400, "week": 604_800}
_INSTANT = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,6})?)?(Z|[+-]\d\d:\d\d)?)?", re.ASCII)
_PARTITION_COLUMN = re.compile(r"[^\x00-\x20\x7f,;{}()=/_.][^\x00-\x20\x7f,;{}()=/]{0,254}")
_SOURCE_TABLE = re.compile(r"[^\x00-\x20./\x7f`%]+\.[^\x00-\x20./\x7f`%]+")
_STREAM_NAME = re.compile(r"[a-z][a-z0-9_]*")
#: The rescued data of text files has the file's path under this name, with underscores in front where a key has it too.
RESCUED_PATH = re.compile(r"_+file_path")
_MAX_HINTS = 1000


@dataclass(frozen=True, slots=True, order=True)
class TableName:
    """A Unity Catalog name of three levels.

    Attributes:
        catalog: For example `workspace`.
        schema: For example `01_bronze`.
        table: For example `telematics`.
    """

    catalog: str
    schema: str
    table: str

    def __post_init__(self) -> None:
        for part in (self.catalog, self.schema, self.table):
            if not is_name(part):
                raise UnknownNameError(
                    f"{part!r} is not a catalog, schema or table name. "
                    "Names hold no space, dot, slash, backtick or control character."
                )

    def __str__(self) -> str:
        return f"{self.catalog}.{self.schema}.{self.table}"

    @property
    def sql(self) -> str:
        """The name as SQL text, every level in backticks (`01_bronze` starts with a digit)."""
        return f"`{self.catalog}`.`{self.schema}`.`{self.table}`"

    @property
    def location(self) -> str:
        """The name as a relative path: `workspace/01_bronze/telematics`."""
        return f"{self.catalog}/{self.schema}/{self.table}"

    @classmethod
    def parse(cls, text: str) -> TableName:
        """Parse `catalog.schema.table`, with or without backticks.

        Raises:
            UnknownNameError: If `text` has not exactly three levels.
        """
        parts = [part.strip("`") for part in text.split(".")]
        if len(parts) != 3:
            raise UnknownNameError(
                f"{text!r} is not a full table name. Give three levels, such as workspace.01_bronze.telematics."
            )
        return cls(*parts)


def is_name(text: str) -> bool:
    """Whether a text can be one level of a table name."""
    return _NAME.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Names:
    """The names that a deployment may choose.

    Attributes:
        catalog: Unity Catalog catalog.
        landing_schema: Schema of the landing Volume.
        bronze_schema: Schema of the bronze tables.
        volume: The landing Volume.
    """

    catalog: str = "workspace"
    landing_schema: str = "00_landing"
    bronze_schema: str = "01_bronze"
    volume: str = "telematics"

    def bronze(self, table: str) -> TableName:
        """The full name of a bronze table."""
        return TableName(self.catalog, self.bronze_schema, table)

    @property
    def volume_location(self) -> str:
        """The landing Volume as a path: `/Volumes/<catalog>/<schema>/<volume>`."""
        return f"/Volumes/{self.catalog}/{self.landing_schema}/{self.volume}"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table contract.

    Attributes:
        name: Column name; units are part of the name (`speed_kmh`).
        type: Delta type in SQL spelling: STRING, BIGINT, INT, SMALLINT, TINYINT, DOUBLE, FLOAT, BOOLEAN, TIMESTAMP
            (UTC, microseconds), TIMESTAMP_NTZ, DATE, BINARY, DECIMAL(p,s), ARRAY<...>, MAP<...> or STRUCT<...>. JSON
            has no BINARY and no MAP with keys other than STRING; csv has scalars only, and no BINARY.
        comment: What it means, with its unit.
        required: Files without this column are refused at staging.
        minimum: Smallest plausible value, or None. Values outside are kept and counted by a check.
        maximum: Largest plausible value, or None.
    """

    name: str
    type: str
    comment: str
    required: bool = False
    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True, slots=True)
class TableContract:
    """What a table promises its readers.

    Attributes:
        comment: What one row is.
        columns: The promised columns, in order. Columns that arrive beyond them are added behind them.
        owners: Dagster owners (`team:…` or an e-mail address).
        tags: Free key-value tags.
    """

    comment: str
    columns: tuple[Column, ...] = ()
    owners: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FileStreamOptions:
    """Auto Loader's options, in snake_case. An unknown option is an error.

    Attributes:
        schema_evolution_mode: `addNewColumns` adds unknown columns to the table in the same run;
            `addNewColumnsWithTypeWidening` also widens a column whose type can't hold a Parquet file's (INT to BIGINT;
            see `lakehouse.types.wider`), for which that batch's commit writes the whole table anew; `rescue` never
            changes the table and puts them into the rescued data column. In the next two the contract's columns are the
            table's from its beginning (the first files' columns if the contract has none): `failOnNewColumns` refuses
            a batch with a file that has others, until the contract, the mode or the file is changed; `none` ignores
            them: no column is added and nothing fails, they go into the rescued data column.
        rescued_data_column: Name of the column that holds what did not fit the table.
        max_files_per_trigger: Files of one batch, at least 1.
        max_bytes_per_trigger: Bytes after which a batch takes no further file, a whole number or a text such as `10g`
            (a `k` is 1024). Soft: the file that passes the limit is still taken, and so is at least one. None: no
            limit.
        path_glob_filter: Glob that a file's name must match, as Spark reads it (`*`, `?`, `[a-c]`, `{a,b}`); the stream
            does not see other files. None: all.
        modified_after: ISO timestamp, UTC unless it says otherwise. Files modified then or before are not seen.
        modified_before: The same; files modified then or later are not seen.
        include_existing_files: False: files that are there when the stream begins, which is its first load, are
            recorded as `SKIPPED_EXISTING`, and loaded by a backfill only. Counts at that moment only.
        allow_overwrites: Files that changed after they were ingested are ingested again; the new rows stand beside the
            old ones.
        use_incremental_listing: `false` lists the whole folder whenever it looks. `auto` lists it only from a path on
            that lies before the newest files, where the ledger shows that names sort like time (folders by date,
            numbers of equal width); `true` takes that order for granted. Both list whole as long as that saves little.
            A bool is accepted too.
        backfill_interval: Incremental listing: the whole folder is listed at least this often, so that late files
            below that path are found; an interval such as `1 day` or `6 hours`.
        schema_hints: Types of columns and of fields inside of them, in SQL spelling: `speed_kmh DOUBLE, device.model
            STRING, legs ARRAY<STRUCT<km: DOUBLE>>`. They are columns of a new table from its beginning, and type those
            that come later; a column that the table has stays as it is. A path makes its column a STRUCT with at least
            that field. A contract column may be hinted with its own type only.
        infer_column_types: JSON and csv: columns that neither contract nor hint declares get the type that all sampled
            values fit, instead of STRING. See `autoloader/inference.py`.
        schema_inference_sample_files: How many files of the first batch, oldest first, give a new table its types.
        schema_inference_sample_bytes: How many bytes of them, unpacked; a whole number or a text such as `32m`.
        partition_columns: Names of Hive style folders (`…/date=2026-01-31/hour=07/f.parquet`) that become columns:
            names separated by commas, or several names. They have the type that contract or hint declares,
            else STRING. "" or None: none.
        clean_source: What becomes of a file in the landing folder once its rows have been in the table for
            `clean_source_retention_duration`: `OFF` nothing, `DELETE` or `MOVE`. Files that were skipped, or that
            changed since, stay.
        clean_source_retention_duration: How long, as an interval such as `14 days` or `12 hours`; at least 7 days for
            `DELETE`.
        clean_source_move_destination: `MOVE`: folder of the same Volume, outside the stream's, such as
            `_archive/telematics`.
        raw_record_column: JSON and csv: name of a column that holds each record as it stands in the file, or None.
        multi_line: JSON: a file is a document, an array of records or one record, not a record on each line; None is
            False. csv: line ends may stand within quotes; None is True, so that no quoted text is torn.
        header: csv: whether a file's first record names its columns. If not, the contract's columns come in order.
        sep: csv: the separator, one ASCII character.
        quote: csv: the quote, one ASCII character, or "" if there is none. In quotes a doubled one stands for itself.
    """

    schema_evolution_mode: SchemaEvolutionMode = "addNewColumns"
    rescued_data_column: str = "_rescued_data"
    max_files_per_trigger: int = 1000
    max_bytes_per_trigger: int | str | None = None
    path_glob_filter: str | None = None
    modified_after: str | None = None
    modified_before: str | None = None
    include_existing_files: bool = True
    allow_overwrites: bool = False
    use_incremental_listing: IncrementalListing | bool = "false"
    backfill_interval: str = "1 hour"
    schema_hints: str | None = None
    infer_column_types: bool = False
    schema_inference_sample_files: int = 1000
    schema_inference_sample_bytes: int | str = "32m"
    partition_columns: str | Sequence[str] | None = None
    clean_source: CleanSource = "OFF"
    clean_source_retention_duration: str = "30 days"
    clean_source_move_destination: str | None = None
    raw_record_column: str | None = None
    multi_line: bool | None = None
    header: bool = True
    sep: str = ","
    quote: str = '"'

    def __post_init__(self) -> None:
        accepted = get_args(SchemaEvolutionMode)
        if self.schema_evolution_mode not in accepted:
            raise OptionError(
                f"schema_evolution_mode={self.schema_evolution_mode!r} is not accepted. Use one of: "
                f"{', '.join(accepted)}."
            )
        if type(self.max_files_per_trigger) is not int or self.max_files_per_trigger < 1:
            raise OptionError(
                f"max_files_per_trigger={self.max_files_per_trigger!r} is not accepted. Use a whole number from 1."
            )
        reserved = {SOURCE_FILE, SOURCE_FILE_MODIFIED_AT, BATCH_ID, INGESTED_AT, CORRUPT_RECORD}
        for option in ("rescued_data_column", "raw_record_column"):
            name = getattr(self, option)
            if name is None and option == "raw_record_column":
                continue
            if not isinstance(name, str) or not _OWN_COLUMN.fullmatch(name) or name.lower() in reserved:
                raise OptionError(
                    f"{option}={name!r} is not accepted. Use a column name that starts with '_', of letters, "
                    "digits and '_', "
                    "and is none of: "
                    f"{', '.join(sorted(reserved))}."
                )
        if self.raw_record_column is not None and self.raw_record_column.lower() == self.rescued_data_column.lower():
            raise OptionError("raw_record_column and rescued_data_column name the same column. Give them two names.")
        self._check_partition_columns()
        self._check_text_options()
        self._check_choice_of_files()
        self._check_types()
        self._check_clean_source()

    def _check_partition_columns(self) -> None:
        given = self.partition_columns
        known = given is None or isinstance(given, (str, list, tuple))
        names: tuple[Any, ...] = self.partition_names if known else (given,)
        for name in names:
            if not isinstance(name, str) or not _PARTITION_COLUMN.fullmatch(name):
                raise OptionError(
                    f"partition_columns={given!r} is not accepted: {name!r} names no folder that is "
                    "read as a column. Use names separated by commas, such as 'date,hour', that start with neither '_' "
                    "nor '.' and hold no blank and none of ,;{}()=/."
                )
        if len({name.lower() for name in names}) < len(names):
            raise OptionError(f"partition_columns={given!r} names a column twice. Name each once.")

    def _check_text_options(self) -> None:
        for option in ("multi_line", "header"):
            value = getattr(self, option)
            if type(value) is not bool and not (value is None and option == "multi_line"):
                raise OptionError(f"{option}={value!r} is not accepted. Use True or False.")
        for option in ("sep", "quote"):
            char = getattr(self, option)
            if char == "" and option == "quote":
                continue
            if not isinstance(char, str) or not _SEPARATOR.fullmatch(char):
                raise OptionError(
                    f"{option}={char!r} is not accepted. Use one ASCII character that is no line end (a tab is '\\t')"
                    f"{', or an empty text for no quotes' if option == 'quote' else ''}."
                )
        if self.sep == self.quote:
            raise OptionError(f"sep and quote are both {self.sep!r}. Give two different characters.")

    def _check_choice_of_files(self) -> None:
        if isinstance(self.use_incremental_listing, bool):
            object.__setattr__(self, "use_incremental_listing", str(self.use_incremental_listing).lower())
        if self.use_incremental_listing not in get_args(IncrementalListing):
            raise OptionError(
                f"use_incremental_listing={self.use_incremental_listing!r} is not accepted. Use one of: "
                f"{', '.join(get_args(IncrementalListing))}."
            )
        if not self.backfill_ns:
            raise OptionError(
                f"backfill_interval={self.backfill_interval!r} is not accepted. Use an interval above 0, such as "
                "'1 hour'; to list the whole folder always, use_incremental_listing='false'."
            )
        for option in ("include_existing_files", "allow_overwrites"):
            if not isinstance(getattr(self, option), bool):
                raise OptionError(f"{option}={getattr(self, option)!r} is not accepted. Use True or False.")
        if self.batch_bytes is not None and self.batch_bytes < 1:
            raise OptionError(f"max_bytes_per_trigger={self.max_bytes_per_trigger!r} is not accepted. {_SIZES_OR_NONE}")
        if self.path_glob_filter is not None:
            try:
                name_pattern(self.path_glob_filter)
            except (TypeError, ValueError) as error:
                raise OptionError(
                    f"path_glob_filter={self.path_glob_filter!r} is not accepted: {error}. Use a glob on file names of "
                    "'*', '?', '[a-c]', '[!a]' and '{a,b}', such as '*.json', or None for all files."
                ) from None
        after, before = self.modified_bounds
        if after is not None and before is not None and before - after < 2:
            raise OptionError(
                f"No file is modified after {self.modified_after!r} and before {self.modified_before!r}. "
                "Give a modified_before that is later than modified_after."
            )

    def _check_types(self) -> None:
        if type(self.infer_column_types) is not bool:
            raise OptionError(f"infer_column_types={self.infer_column_types!r} is not accepted. Use True or False.")
        files = self.schema_inference_sample_files
        if type(files) is not int or files < 1:
            raise OptionError(f"schema_inference_sample_files={files!r} is not accepted. Use a whole number from 1.")
        if self.sample_bytes < 1:
            raise OptionError(
                f"schema_inference_sample_bytes={self.schema_inference_sample_bytes!r} is not accepted. {_SIZES}"
            )
        if len(self.hints) > _MAX_HINTS:
            raise OptionError(f"schema_hints has {len(self.hints)} hints. Give at most {_MAX_HINTS}.")

    def _check_clean_source(self) -> None:
        accepted = get_args(CleanSource)
        if self.clean_source not in accepted:
            raise OptionError(f"clean_source={self.clean_source!r} is not accepted. Use one of: {', '.join(accepted)}.")
        # Read whatever clean_source is: a text that is no interval must not wait for the first load to say so.
        retention = self.clean_source_retention_ns
        if self.clean_source == "DELETE" and retention < 7 * _UNIT_SECONDS["day"] * 1_000_000_000:
            raise OptionError(
                f"clean_source_retention_duration={self.clean_source_retention_duration!r} is not accepted: what is "
                "deleted can't be loaded again. Use at least '7 days' with clean_source='DELETE', or 'MOVE'."
            )
        destination = self.clean_source_move_destination
        if self.clean_source == "MOVE" and destination is None:
            raise OptionError(
                "clean_source='MOVE' needs clean_source_move_destination: a folder of the Volume outside the stream's, "
                "such as '_archive/telematics'."
            )
        if destination is not None:
            check_path(destination)
            if f"{destination}/".startswith("_checkpoints/"):
                raise OptionError(
                    f"clean_source_move_destination={destination!r} is not accepted: _checkpoints is the loader's own. "
                    "Use another folder, such as '_archive/telematics'."
                )

    @property
    def clean_source_retention_ns(self) -> int:
        """`clean_source_retention_duration` in nanoseconds.

        Raises:
            OptionError: If it is no interval.
        """
        return interval_ns("clean_source_retention_duration", self.clean_source_retention_duration)

    @property
    def partition_names(self) -> tuple[str, ...]:
        """`partition_columns` as single names."""
        given = self.partition_columns
        if isinstance(given, str):
            return tuple(name.strip() for name in given.split(",")) if given.strip() else ()
        return tuple(given or ())

    @property
    def batch_bytes(self) -> int | None:
        """`max_bytes_per_trigger` as a number.

        Raises:
            OptionError: If it is none.
        """
        given = self.max_bytes_per_trigger
        return None if given is None else _size("max_bytes_per_trigger", given, _SIZES_OR_NONE)

    @property
    def sample_bytes(self) -> int:
        """`schema_inference_sample_bytes` as a number.

        Raises:
            OptionError: If it is none.
        """
        return _size("schema_inference_sample_bytes", self.schema_inference_sample_bytes, _SIZES)

    @property
    def hints(self) -> tuple[Hint, ...]:
        """`schema_hints` as they were read.

        Raises:
            OptionError: If they are none.
        """
        if self.schema_hints is None:
            return ()
        try:
            if not isinstance(self.schema_hints, str):
                raise ValueError("it is no text")
            return parse_hints(self.schema_hints)
        except ValueError as error:
            raise OptionError(
                f"schema_hints={self.schema_hints!r} is not accepted: {error}. Give 'path type' or 'path: type', comma "
                "by comma, such as 'speed_kmh DOUBLE, device.model STRING', names with other characters in backticks. "
                f"As a type {ACCEPTED[0].lower()}{ACCEPTED[1:]}"
            ) from None

    @property
    def backfill_ns(self) -> int:
        """`backfill_interval` in nanoseconds.

        Raises:
            OptionError: If it is none.
        """
        return interval_ns("backfill_interval", self.backfill_interval)

    @property
    def modified_bounds(self) -> tuple[int | None, int | None]:
        """`modified_after` and `modified_before` in nanoseconds since the epoch.

        Raises:
            OptionError: If one of them is no timestamp.
        """
        return _instant_ns("modified_after", self.modified_after), _instant_ns("modified_before", self.modified_before)

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> FileStreamOptions:
        """Make options from a mapping.

        Raises:
            OptionError: If a name is unknown (the message shows the nearest known one) or a value is not accepted.
        """
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.removeprefix("cloudFiles.")).lower()
                near = difflib.get_close_matches(snake, known, 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise OptionError(f"Unknown option {name!r}.{hint} Accepted: {', '.join(known)}.")
        return cls(**options)


@dataclass(frozen=True, slots=True)
class FileStream:
    """Files of one folder of the landing Volume that become rows of one bronze table.

    Attributes:
        name: Name of the stream, its checkpoint, its landing asset and its sensor: lower-case letters, digits, `_`.
        format: `parquet`; `json` (one JSON object per line, or a document with `multi_line`) or `csv`, both plain or
            packed with gzip, bzip2 or Zstandard.
        folder: Folder inside the landing Volume.
        table: Bronze table, one level (`telematics`); the deployment's `Names` give the rest.
        contract: What the table promises.
        options: Auto Loader options; a mapping is parsed.
        fresh_within_hours: Hours without new rows after which the table counts as overdue; None: never.
    """

    name: str
    format: FileFormat
    folder: str
    table: str
    contract: TableContract
    options: FileStreamOptions = field(default_factory=FileStreamOptions)
    fresh_within_hours: float | None = None

    def __post_init__(self) -> None:
        if not _STREAM_NAME.fullmatch(self.name):
            raise OptionError(
                f"{self.name!r} is not a stream name. Use lower-case letters, digits and '_', a letter first."
            )
        if self.format not in get_args(FileFormat):
            raise OptionError(f"format={self.format!r} is not accepted. Use one of: {', '.join(get_args(FileFormat))}.")
        check_path(self.folder)
        if any(part.startswith(("_", ".")) for part in self.folder.split("/")):
            raise OptionError(f"folder={self.folder!r} is not accepted: names that start with '_' or '.' are not data.")
        if isinstance(self.options, Mapping):
            object.__setattr__(self, "options", FileStreamOptions.parse(self.options))
        if self.fresh_within_hours is not None and not self.fresh_within_hours > 0:
            raise OptionError(f"fresh_within_hours={self.fresh_within_hours!r} is not accepted. Use a number above 0.")
        self._check_options_of_format()
        options = self.options
        archive = options.clean_source_move_destination
        if archive is not None and f"{archive}/".startswith(f"{self.folder}/"):
            raise OptionError(
                f"clean_source_move_destination={archive!r} of stream {self.name!r} is not accepted: in its folder "
                f"{self.folder!r} the files would be found again. Use a folder outside, such as '_archive/{self.name}'."
            )
        if archive is not None and self.folder.startswith(f"{archive}/"):
            raise OptionError(
                f"clean_source_move_destination={archive!r} of stream {self.name!r} is not accepted: the stream's "
                f"folder {self.folder!r} is in it. Use a folder outside, such as '_archive/{self.name}'."
            )
        mode = options.schema_evolution_mode
        if not mode.startswith("addNewColumns") and not options.include_existing_files and not self.contract.columns:
            raise OptionError(
                f"include_existing_files=False with schema_evolution_mode={mode!r} needs a contract with columns, for "
                f"no file gives any to the table. Declare columns of stream {self.name!r}, or use "
                "schema_evolution_mode='addNewColumns'."
            )
        taken = {name.lower() for name in self.own_columns}
        for column in self.contract.columns:
            if column.name.lower() in taken:
                raise OptionError(
                    f"The contract of stream {self.name!r} declares {column.name!r} twice, or uses a name of our own."
                )
            taken.add(column.name.lower())
        self._check_types()
        self._check_partition_columns()

    def _check_partition_columns(self) -> None:
        own = {name.lower() for name in self.own_columns}
        declared = {*(c.name for c in self.contract.columns), *(hint.path[0] for hint in self.options.hints)}
        lowered = {name.lower() for name in declared}
        for name in self.options.partition_names:
            if name.lower() in own or (name.lower() in lowered and name not in declared):
                raise OptionError(
                    f"Partition column {name!r} of stream {self.name!r} is a name of our own, or differs from a column "
                    "of the contract or the schema hints by case only. Name it as they do."
                )

    def _check_types(self) -> None:
        declared: dict[str, DeltaType] = {}
        for column in self.contract.columns:
            try:
                declared[column.name] = parse_type(column.type)
            except ValueError as error:
                raise OptionError(
                    f"Column {column.name!r} of stream {self.name!r} is {column.type!r}, which is not a column type. "
                    f"{ACCEPTED} Here {error}."
                ) from None
            self._check_text_type(f"Column {column.name!r}", (column.name,), declared[column.name])
        own = {name.lower() for name in self.own_columns}
        lowered = {name.lower(): name for name in declared}
        for hint in self.options.hints:
            name = hint.path[0]
            if name.lower() in own:
                raise OptionError(
                    f"schema_hints of stream {self.name!r} has '{hint}', and {name!r} is a name of our own. Leave it "
                    "out."
                )
            contract = lowered.get(name.lower())
            if contract is not None and (contract != name or _at(declared[contract], hint.path[1:]) != hint.type):
                raise OptionError(
                    f"schema_hints of stream {self.name!r} has '{hint}', and the contract declares {contract!r} as "
                    f"{declared[contract]}. Give both the same type, or leave the hint out."
                )
            self._check_text_type(f"The schema hint '{hint}'", hint.path, hint.type)

    def _check_text_type(self, subject: str, path: tuple[str, ...], kind: DeltaType) -> None:
        """Refuse a type that text files can't show."""
        subject = f"{subject} of stream {self.name!r}"
        if self.format == "parquet":
            return
        if self.format == "csv" and (kind.parts or len(path) > 1):
            raise OptionError(
                f"{subject} is nested, and a csv field is one text. Declare it as STRING, and take it apart in a later "
                "table."
            )
        if RESCUED_PATH.fullmatch(path[0]) and (kind.name != "STRING" or len(path) > 1):
            raise OptionError(
                f"{subject} is typed, and the rescued data uses this name for the file's path. Declare it as STRING."
            )
        for part in _types_of(kind):
            if part.name == "BINARY":
                raise OptionError(
                    f"{subject} has BINARY, and {_SHOWN[self.format]} files hold text only. Declare it as STRING, and "
                    "decode it in a later table."
                )
            if part.name == "MAP" and part.parts[0][1].name != "STRING":
                raise OptionError(
                    f"{subject} has a MAP with keys of {part.parts[0][1]}, and keys in JSON are text. Use "
                    f"MAP<STRING, {part.parts[1][1]}>."
                )

    def _check_options_of_format(self) -> None:
        if self.format == "parquet":
            for option in ("raw_record_column", "multi_line"):
                if getattr(self.options, option) is not None:
                    raise OptionError(f"{option} needs format='json' or 'csv': other formats have no records of text.")
            if self.options.infer_column_types:
                raise OptionError("infer_column_types needs format='json' or 'csv': Parquet files tell their types.")
        if self.format != "csv":
            default = FileStreamOptions()
            for option in ("header", "sep", "quote"):
                if getattr(self.options, option) != getattr(default, option):
                    raise OptionError(f"{option} needs format='csv'; stream {self.name!r} has format={self.format!r}.")

    @property
    def own_columns(self) -> tuple[str, ...]:
        """Columns that the loader adds behind the data, in table order."""
        own: list[str] = []
        if self.format != "parquet":
            own.append(CORRUPT_RECORD)
            if self.options.raw_record_column:
                own.append(self.options.raw_record_column)
        own += [self.options.rescued_data_column, SOURCE_FILE, SOURCE_FILE_MODIFIED_AT, BATCH_ID, INGESTED_AT]
        return tuple(own)

    def with_options(self, **options: Any) -> FileStream:
        """A copy with some options changed."""
        return replace(self, options=FileStreamOptions.parse({**_as_dict(self.options), **options}))


_SIZES = "Use a whole number of bytes from 1, or a text such as '512m' or '10g'."
_SIZES_OR_NONE = f"{_SIZES[:-1]}, or None for no limit."


def _size(option: str, given: object, accepted: str) -> int:
    if type(given) is int:
        return given
    found = _BYTES.fullmatch(given.strip().lower()) if isinstance(given, str) else None
    if found is None:
        raise OptionError(f"{option}={given!r} is not accepted. {accepted}")
    return int(found[1]) << 10 * " kmgtp".index(found[2].removesuffix("b") or " ")


def interval_ns(option: str, text: str) -> int:
    """The length of an interval as Spark writes it, such as `1 day` or `interval 1 hour 30 minutes`, in nanoseconds.

    Args:
        option: Whose value it is, for the message.
        text: The interval; months and years have no fixed length.

    Raises:
        OptionError: If it is none.
    """
    said = text.strip().lower().removeprefix("interval ") if isinstance(text, str) else ""
    parts = _INTERVAL_PART.findall(said)
    if not parts or _INTERVAL_PART.sub("", said).strip():
        raise OptionError(
            f"{option}={text!r} is not accepted. Use an interval of weeks, days, hours, minutes and seconds, such as "
            "'1 day', '6 hours' or '1 hour 30 minutes'."
        )
    return sum(int(number) * _UNIT_SECONDS[unit] for number, unit in parts) * 1_000_000_000


@dataclass(frozen=True, slots=True)
class ReplicatedTable:
    """A table of the Supabase database that a bronze table mirrors.

    Attributes:
        source: Schema and table in PostgreSQL, such as `public.policies`.
        mode: How changed rows are found. `row_xid`: an indexed column that a trigger fills with the writing
            transaction's id (`telematics supabase sql` prints it); loses nothing. `xmin`: the system column; needs no
            change of the database, scans the table. `updated_at`: a time column with a lag; its gap is documented.
            `snapshot`: the whole table each time.
        table: Bronze table, one level; `supabase_<table>` if None.
        deletes: How deleted rows are found. `tombstones`: a trigger records them (mode `row_xid`); `sweep`: keys are
            compared on a schedule; `none`: rows stay. None: `tombstones` for `row_xid`, `sweep` for `xmin` and
            `updated_at`; a snapshot sees deletes by itself.
        key: Columns that identify a row; the primary key, introspected, if None. Given ones are checked against it.
        position_column: Column of mode `row_xid` (default `row_xid`) or `updated_at` (default `updated_at`).
        lag_seconds: Mode `updated_at`: how far behind the newest time a batch ends, seconds.
        sweep_hours: Hours between two sweeps; also with tombstones, which some statements bypass.
        exclude: Columns that are left out.
        hash: Columns of which only a keyed hash arrives (personal data).
        contract: What the bronze table promises; columns are the source's if it declares none.
        fresh_within_minutes: Minutes without a successful batch after which the table counts as overdue; None: never.
    """

    source: str
    mode: ReplicationMode = "row_xid"
    table: str | None = None
    deletes: DeleteHandling | None = None
    key: tuple[str, ...] | None = None
    position_column: str | None = None
    lag_seconds: float = 60.0
    sweep_hours: float = 24.0
    exclude: tuple[str, ...] = ()
    hash: tuple[str, ...] = ()
    contract: TableContract = field(default_factory=lambda: TableContract(""))
    fresh_within_minutes: float | None = None

    def __post_init__(self) -> None:
        if not _SOURCE_TABLE.fullmatch(self.source):
            raise OptionError(
                f"source={self.source!r} is not accepted. Give schema and table in PostgreSQL, such as public.policies."
            )
        for option, kind in (("mode", ReplicationMode), ("deletes", DeleteHandling)):
            value = getattr(self, option)
            if value not in get_args(kind) and not (value is None and option == "deletes"):
                raise OptionError(f"{option}={value!r} is not accepted. Use one of: {', '.join(get_args(kind))}.")
        if self.deletes == "tombstones" and self.mode != "row_xid":
            raise OptionError(
                f"deletes='tombstones' needs mode='row_xid'; {self.source} has mode={self.mode!r}. Use deletes='sweep'."
            )
        if self.mode == "snapshot" and self.deletes is not None:
            raise OptionError(
                f"deletes of {self.source} can't be chosen: a snapshot sees them by itself. Leave it out."
            )
        for option in ("lag_seconds", "sweep_hours"):
            value = getattr(self, option)
            if not isinstance(value, int | float) or not 0 <= value < 1e9:
                raise OptionError(f"{option}={value!r} is not accepted. Use a number from 0.")
        for option in ("exclude", "hash", *(["key"] if self.key is not None else [])):
            names = getattr(self, option)
            if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
                raise OptionError(f"{option}={names!r} of {self.source} is not accepted. Give a tuple of column names.")
        both = {*self.exclude} & {*self.hash}
        lost = {*self.exclude, *self.hash} & {*(self.key or ()), *filter(None, [self.position_column])}
        if both or lost:
            raise OptionError(
                f"{', '.join(sorted(both | lost))} of {self.source} can't be left out or hashed: "
                f"{'it is in exclude and in hash' if both else 'it is the key or the position'}."
            )
        is_name(self.target) or TableName("catalog", "schema", self.target)

    @property
    def target(self) -> str:
        """The bronze table, one level."""
        return self.table or f"supabase_{self.source.split('.')[1]}"

    @property
    def delete_handling(self) -> DeleteHandling:
        """`deletes`, or what the mode makes of it if it is None."""
        if self.deletes is not None:
            return self.deletes
        return {"row_xid": "tombstones", "snapshot": "none"}.get(self.mode, "sweep")  # type: ignore[return-value]

    @property
    def position(self) -> str | None:
        """The column that holds a row's position, or None for the modes without one."""
        return self.position_column or (self.mode if self.mode in ("row_xid", "updated_at") else None)


def _instant_ns(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        if not isinstance(text, str) or not _INSTANT.fullmatch(text):
            raise ValueError
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise OptionError(
            f"{option}={text!r} is not accepted. Use an ISO timestamp such as '2026-01-31', '2026-01-31T12:00:00' "
            "(both UTC) or '2026-01-31T12:00:00+02:00', with at most six digits of a second, or None."
        ) from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000


_SHOWN = {"json": "JSON", "csv": "csv"}


def _types_of(kind: DeltaType) -> Iterator[DeltaType]:
    """A type and all types inside of it."""
    yield kind
    for _, part in kind.parts:
        yield from _types_of(part)


def _at(kind: DeltaType, path: tuple[str, ...]) -> DeltaType | None:
    """The type of a field, by the names of the structs' fields that lead to it."""
    for name in path:
        fields = dict(kind.parts) if kind.name == "STRUCT" else {}
        if name not in fields:
            return None
        kind = fields[name]
    return kind


def _as_dict(options: FileStreamOptions) -> dict[str, Any]:
    return {f.name: getattr(options, f.name) for f in fields(options)}


def find_table(tables: Sequence[ReplicatedTable], name: str) -> ReplicatedTable:
    """The replicated table of that name: the source's, with or without its schema, or the bronze table's.

    Raises:
        UnknownNameError: If there is none, or the name fits several; the message lists those there are.
    """
    found = [table for table in tables if name in (table.source, table.target, table.source.split(".")[1])]
    exact = [table for table in found if name == table.source] or found
    if len(exact) == 1:
        return exact[0]
    known = ", ".join(table.source for table in exact or tables) or "none"
    several = "is the name of several tables" if exact else "is no replicated table"
    raise UnknownNameError(f"{name!r} {several}. Tables: {known}.")


def find_stream(streams: Sequence[FileStream], name: str) -> FileStream:
    """The stream of that name.

    Raises:
        UnknownNameError: If there is none; the message lists those there are.
    """
    for stream in streams:
        if stream.name == name:
            return stream
    known = ", ".join(stream.name for stream in streams) or "none"
    raise UnknownNameError(f"There is no stream {name!r}. Streams: {known}.")


_POINT_COLUMNS = (
    Column("vehicle_id", "STRING", "Fleet number of the vehicle.", required=True),
    Column("chassis_no", "STRING", "Chassis number (VIN, 17 characters); joins to the insured vehicle.", required=True),
    Column("trip_id", "STRING", "Trip that the point belongs to; a new one at each ignition.", required=True),
    Column("recorded_at", "TIMESTAMP", "When the device took the point, UTC.", required=True),
    Column("latitude", "DOUBLE", "WGS 84 latitude, degrees.", required=True, minimum=-90, maximum=90),
    Column("longitude", "DOUBLE", "WGS 84 longitude, degrees.", required=True, minimum=-180, maximum=180),
    Column("speed_kmh", "DOUBLE", "Speed over ground, km/h.", required=True, minimum=0, maximum=300),
    Column("heading_deg", "DOUBLE", "Course over ground, degrees clockwise from north.", minimum=0, maximum=360),
    Column("acceleration_ms2", "DOUBLE", "Acceleration ahead, m/s²; braking is negative.", minimum=-20, maximum=20),
    Column("odometer_km", "DOUBLE", "Distance driven in the vehicle's life, km.", minimum=0),
    Column("engine_rpm", "INT", "Engine speed, revolutions per minute.", minimum=0, maximum=12000),
    Column("fuel_level_pct", "DOUBLE", "Fuel in the tank, percent.", minimum=0, maximum=100),
    Column("ignition_on", "BOOLEAN", "Whether the ignition is on."),
)

TELEMATICS = FileStream(
    name="telematics",
    format="parquet",
    folder="parquet",
    table="telematics",
    contract=TableContract(
        comment="One row per telematics point that a vehicle's device sent (Parquet files of the landing Volume).",
        columns=_POINT_COLUMNS,
        owners=("team:telematics",),
        tags={"layer": "bronze", "domain": "telematics"},
    ),
)

TELEMATICS_TEST = FileStream(
    name="telematics_test",
    format="json",
    folder="json",
    table="telematics_test",
    contract=TableContract(
        comment="One row per line of the test fleet's JSON files, every value as its text stands in the file.",
        columns=(
            *(replace(column, type="STRING") for column in _POINT_COLUMNS),
            Column("device", "STRING", "The device that sent the point: model, firmware, SIM; a JSON object as text."),
        ),
        owners=("team:telematics",),
        tags={"layer": "bronze", "domain": "telematics"},
    ),
    options=FileStreamOptions(raw_record_column="_raw_record"),
)

#: The file streams that ship with the project.
FILE_STREAMS: tuple[FileStream, ...] = (TELEMATICS, TELEMATICS_TEST)

_INSURANCE = {"layer": "bronze", "domain": "insurance"}
_INSURANCE_OWNERS = ("team:insurance",)
_UPDATED_AT = Column("updated_at", "TIMESTAMP", "When the row was last changed, UTC.")

CUSTOMERS = ReplicatedTable(
    source="public.customers",
    exclude=("full_name", "phone", "date_of_birth", "address"),
    hash=("email",),
    contract=TableContract(
        comment="One row per customer of the insurer; personal data stays in the source.",
        columns=(
            Column("id", "STRING", "Key (UUID).", required=True),
            Column("customer_no", "BIGINT", "Number that the customer is told.", required=True),
            Column("email", "STRING", "Keyed hash of the e-mail address; the same address has the same hash."),
            Column("country", "STRING", "Country of residence, ISO 3166 alpha-2."),
            Column("language", "STRING", "Preferred language, ISO 639-1."),
            Column("segments", "ARRAY<STRING>", "Marketing segments."),
            Column("marketing_consent", "BOOLEAN", "Whether the customer agreed to marketing; null if never asked."),
            Column("created_at", "TIMESTAMP", "When the customer was recorded, UTC."),
            _UPDATED_AT,
        ),
        owners=_INSURANCE_OWNERS,
        tags=_INSURANCE,
    ),
)

VEHICLES = ReplicatedTable(
    source="public.vehicles",
    hash=("registration",),
    contract=TableContract(
        comment="One row per insured vehicle; chassis_no joins to the telematics points.",
        columns=(
            Column("id", "BIGINT", "Key.", required=True),
            Column("chassis_no", "STRING", "Chassis number (VIN, 17 characters); joins to telematics.", required=True),
            Column("customer_id", "STRING", "The customer who owns it."),
            Column("registration", "STRING", "Keyed hash of the registration plate."),
            Column("make", "STRING", "Manufacturer."),
            Column("model", "STRING", "Model."),
            Column("fuel", "STRING", "petrol, diesel, electric or hybrid."),
            Column("built_year", "SMALLINT", "Year of manufacture.", minimum=1900, maximum=2100),
            Column("power_kw", "INT", "Power of the engine, kW.", minimum=0, maximum=1500),
            Column("list_price_eur", "DECIMAL(12,2)", "Price when new, EUR.", minimum=0),
            Column("first_registered", "DATE", "Day of its first registration."),
            Column("equipment", "ARRAY<STRING>", "Safety equipment."),
            _UPDATED_AT,
        ),
        owners=_INSURANCE_OWNERS,
        tags=_INSURANCE,
    ),
)

POLICIES = ReplicatedTable(
    source="public.policies",
    contract=TableContract(
        comment="One row per policy, in its current state.",
        columns=(
            Column("policy_no", "STRING", "Key: number of the policy.", required=True),
            Column("customer_id", "STRING", "The policy holder."),
            Column("vehicle_id", "BIGINT", "The insured vehicle."),
            Column("state", "STRING", "quoted, active, lapsed or cancelled."),
            Column("premium_eur", "DECIMAL(12,2)", "Premium of a year, EUR.", minimum=0),
            Column("sum_insured_eur", "DECIMAL(14,2)", "Sum insured, EUR.", minimum=0),
            Column("bonus_factor", "DOUBLE", "Factor for years without a claim.", minimum=0.2, maximum=3),
            Column("valid_from", "DATE", "First day of cover."),
            Column("valid_until", "DATE", "Last day of cover; null if it does not end (infinity in the source)."),
            Column("pays_per_km", "BOOLEAN", "Whether the premium follows the distance driven."),
            Column("terms", "STRING", "Cover, deductible and riders; a JSON object as text."),
            Column("created_at", "TIMESTAMP", "When the policy was recorded, UTC."),
            _UPDATED_AT,
        ),
        owners=_INSURANCE_OWNERS,
        tags=_INSURANCE,
    ),
)

CLAIMS = ReplicatedTable(
    source="public.claims",
    exclude=("description",),
    contract=TableContract(
        comment="One row per claim on a policy, in its current state.",
        columns=(
            Column("policy_no", "STRING", "Key, with claim_no: the policy.", required=True),
            Column("claim_no", "INT", "Key, with policy_no: counts the policy's claims.", required=True),
            Column("state", "STRING", "reported, assessed, paid or rejected."),
            Column("occurred_at", "TIMESTAMP", "When the damage was done, UTC."),
            Column("reported_on", "DATE", "When it was reported."),
            Column("claimed_eur", "DECIMAL(12,2)", "Amount claimed, EUR.", minimum=0),
            Column("paid_eur", "DECIMAL(12,2)", "Amount paid, EUR; null until then.", minimum=0),
            Column("fraud_score", "FLOAT", "Likelihood of fraud.", minimum=0, maximum=1),
            Column("police_report", "BOOLEAN", "Whether the police took it up; null if that is not known."),
            Column("photos", "ARRAY<STRING>", "Names of the photos."),
            Column("assessment", "STRING", "The assessor's findings; a JSON object as text."),
            _UPDATED_AT,
        ),
        owners=_INSURANCE_OWNERS,
        tags=_INSURANCE,
    ),
)

DRIVERS = ReplicatedTable(
    source="public.drivers",
    exclude=("full_name", "date_of_birth"),
    hash=("licence_no",),
    contract=TableContract(
        comment="One row per person who may drive an insured vehicle; personal data stays in the source.",
        columns=(
            Column("vehicle_id", "BIGINT", "Key, with driver_no: the vehicle.", required=True),
            Column("driver_no", "SMALLINT", "Key, with vehicle_id: counts the vehicle's drivers.", required=True),
            Column("customer_id", "STRING", "The driver as a customer; null for others."),
            Column("licence_no", "STRING", "Keyed hash of the driving licence's number."),
            Column("licence_classes", "ARRAY<STRING>", "Classes of the driving licence."),
            Column("licensed_since", "DATE", "Day of the driving licence."),
            Column("penalty_points", "SMALLINT", "Penalty points.", minimum=0, maximum=100),
            Column("is_main_driver", "BOOLEAN", "Whether this is the vehicle's main driver."),
            _UPDATED_AT,
        ),
        owners=_INSURANCE_OWNERS,
        tags=_INSURANCE,
    ),
)

#: The tables of the insurer's Supabase database that ship with the project.
REPLICATED_TABLES: tuple[ReplicatedTable, ...] = (CUSTOMERS, VEHICLES, POLICIES, CLAIMS, DRIVERS)
