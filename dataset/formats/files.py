"""Guarded loaders of annotation files: bytes, text, JSON, XML and SQLite, and how text is written.

Files come from strangers. Whatever is wrong with one ends as a UserError that names the file, never
as a traceback, a hang or exhausted memory; nothing in a file is ever executed."""

import codecs
import contextlib
import gzip
import json
import sqlite3
import time
import urllib.parse
import zlib
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree

import common
from common import UserError

# Of a JSON, XML or CSV file, unpacked. MIDOG++ has 3 MB; Python needs ten times the file's size.
MAX_BYTES = 1 << 29
SQLITE_SECONDS = 120  # a damaged or malicious database must not keep a query running for ever
SQLITE_VALUE = 1 << 24  # bytes of one value; a generated column can claim a gigabyte per row
SQLITE_START = b"SQLite format 3\0"


class Source:
    """An annotation file: its path, its suffix (lower case, without .gz) and, loaded when first
    asked for, its content as bytes, text or JSON."""

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"{path}: no such file")
        if not self.path.is_file():
            raise UserError(f"{path}: not an ordinary file; annotations are read from files only")
        name = self.path.name.lower().removesuffix(".gz")
        self.suffix = Path(name).suffix
        self.packed = self.path.name.lower().endswith(".gz")

    @property
    def stem(self):
        """The file's name without its suffixes: 001 for 001.geojson.gz."""
        name = self.path.name
        if self.packed:
            name = name[: -len(".gz")]
        return name[: len(name) - len(self.suffix)]

    @cached_property
    def is_sqlite(self):
        with open(self.path, "rb") as file:
            return file.read(len(SQLITE_START)) == SQLITE_START

    @cached_property
    def bytes(self):
        try:
            opener = gzip.open if self.packed else open
            with opener(self.path, "rb") as file:
                content = file.read(MAX_BYTES + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(
                f"{self.path}: not a complete gzip file ({error}); get it again"
            ) from None
        if len(content) > MAX_BYTES:
            raise UserError(
                f"{self.path}: larger than {MAX_BYTES >> 20} MiB, too large for annotations"
            )
        return content

    @cached_property
    def text(self):
        """The content as text: UTF-8, with or without a byte order mark, or UTF-16 with one."""
        encoding = "utf-8-sig"
        if self.bytes.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            encoding = "utf-16"
        try:
            return self.bytes.decode(encoding)
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: not a text file in UTF-8 or UTF-16") from None

    @cached_property
    def json(self):
        """The content as JSON. Keys that occur twice and endless nesting are refused; NaN is read:
        QuPath writes it among the measurements, where it does no harm."""
        try:
            return json.loads(self.text, object_pairs_hook=_unique)
        except RecursionError:
            raise UserError(f"{self.path}: nested too deeply for an annotation file") from None
        except ValueError as error:
            raise UserError(f"{self.path}: not a readable JSON file ({one_line(error)})") from None

    @cached_property
    def xml(self):
        """The root element of an XML file. Files that define entities are refused."""
        try:
            content = self.text
            hostile = "<!DOCTYPE" in content or "<!ENTITY" in content
        except UserError:  # in another encoding, which the file has to state
            content = self.bytes
            hostile = any(mark in content for mark in (b"<!DOCTYPE", b"<!ENTITY", b"\0"))
        if hostile:
            raise UserError(
                f"{self.path}: defines a document type or entities; such XML is not read"
            )
        try:
            return ElementTree.fromstring(content)
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            raise UserError(f"{self.path}: not a readable XML file ({one_line(error)})") from None


def _unique(pairs):
    record = dict(pairs)
    if len(record) != len(pairs):  # which of the two values counts would be a guess
        raise ValueError("a key occurs twice in one object")
    return record


def one_line(error):
    return " ".join(str(error).split())[:200]


# ---------------------------------------------------------------- SQLite


@contextlib.contextmanager
def sqlite(path):
    """A connection to a database, opened read-only; whatever goes wrong in it is a UserError."""
    # immutable: no lock and no journal is written, so that a read-only folder will do; but it would
    # overlook the changes that another program has left in a -wal file.
    address = f"file:{urllib.parse.quote(str(path.resolve()))}?mode=ro"
    if not Path(f"{path}-wal").exists():
        address += "&immutable=1"
    connection = None
    try:
        connection = sqlite3.connect(address, uri=True)
        guard(connection)
        connection.execute("PRAGMA query_only = 1")
        yield connection
    except sqlite3.OperationalError as error:
        if "interrupted" in str(error):
            raise UserError(
                f"{path}: reading takes longer than {SQLITE_SECONDS} s; the database is damaged"
            ) from None
        raise _unreadable(path, error) from None
    except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
        # UnicodeDecodeError: of names in a damaged schema
        raise _unreadable(path, error) from None
    finally:
        if connection is not None:
            connection.close()


def _unreadable(path, error):
    return UserError(f"{path}: not a readable SlideRunner database ({one_line(error)})")


def guard(connection):
    """Bound what a hostile database can make a connection do: time, memory, functions."""
    end = time.monotonic() + SQLITE_SECONDS
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    connection.set_progress_handler(lambda: time.monotonic() > end, 100_000)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, SQLITE_VALUE)
    connection.execute("PRAGMA trusted_schema = 0")
    connection.execute("PRAGMA cell_size_check = 1")


# ---------------------------------------------------------------- writing


def write_text(path, text):
    """Write a text file in UTF-8, packed if its name ends with .gz."""
    content = text.encode()
    if str(path).lower().endswith(".gz"):
        content = gzip.compress(content, mtime=0)
    with common.atomic(path) as temporary:
        temporary.write_bytes(content)


def write_json(path, content):
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    try:
        write_text(path, text)
    except UnicodeEncodeError:  # half a surrogate pair in the file that was read stays escaped
        write_text(path, json.dumps(content, indent=1) + "\n")
