"""Tables and lists of names that people write: csv of any spreadsheet, text of any
system. One way to read them."""

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path

from ultradino_jax.errors import UserError

_DELIMITERS = ",;\t"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def decode_text(data: bytes, where: str) -> str:
    """Text of a file, its lines ended by a newline each, whatever ended them.

    UTF-16 where its byte order mark says so; else UTF-8, with or without a mark; else
    Windows-1252, which spreadsheets write in western Europe. Raises UserError naming
    the file for bytes that are none of them, or a NUL.
    """
    for encoding in ("utf-16",) if data.startswith(_UTF16) else ("utf-8-sig", "cp1252"):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" in text:
            raise UserError(f"{where}: not text: it holds a NUL byte")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    raise UserError(f"{where}: not text in UTF-8, UTF-16 or Windows-1252")


def read_table(data: bytes, columns: Iterable[str], where: str) -> list[dict[str, str]]:
    """Rows of a csv with ',', ';' or tabs, blanks around headers and values removed.

    columns: those that must be there and hold a value in every row. A first line
    `sep=;` names the separator; otherwise the one that the header has most of is taken.
    Raises UserError naming the file, and the line or the columns in question.
    """
    lines, names = _open(decode_text(data, where), where)
    missing = [name for name in columns if name not in names]
    if missing:
        raise UserError(
            f"{where}: no column {', '.join(map(repr, missing))}; there are "
            f"{', '.join(map(repr, filter(None, names)))}"
        )
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise UserError(f"{where}: two columns are called {twice[0]!r}")
    rows = []
    for number, values in lines:
        if not any(values):
            continue
        while len(values) > len(names) and not values[-1]:
            values.pop()  # separators that a spreadsheet leaves at the end
        if len(values) != len(names):
            raise UserError(
                f"{where}, line {number}: {len(values)} values for {len(names)} columns"
            )
        row = dict(zip(names, values, strict=True))
        row.pop("", None)
        for name in columns:
            if not row[name]:
                raise UserError(f"{where}, line {number}: {name} is empty")
        rows.append(row)
    if not rows:
        raise UserError(f"{where}: there is no row below the header")
    return rows


def _open(text: str, where: str):
    """(iterator of (line number, values), names of the columns)."""
    first, _, rest = text.partition("\n")
    skipped = 0
    if first.strip().strip('"').lower().startswith("sep="):
        delimiter = first.strip().strip('"')[len("sep=") :] or "\t"
        text, skipped = rest, 1
    else:
        counts = {d: first.count(d) for d in _DELIMITERS}
        delimiter = max(counts, key=lambda d: counts[d])
    if len(delimiter) != 1:
        raise UserError(f"{where}: the separator {delimiter!r} is not one character")
    lines = _lines(text, delimiter, skipped, where)
    _, names = next(lines, (0, []))
    while names and not names[-1]:
        names.pop()
    return lines, names


def _lines(text: str, delimiter: str, skipped: int, where: str):
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    try:
        for values in reader:
            yield reader.line_num + skipped, [value.strip() for value in values]
    except csv.Error as error:
        number = reader.line_num + skipped
        raise UserError(f"{where}, line {number}: {error}") from error


def names_in_list(data: bytes, folder: Path, where: str) -> list[str]:
    """Names of a list of files: one a line, or the column `path` of a csv.

    folder: what they are relative to. See `find_name` for how they are taken.
    Raises UserError naming the list when it is no text.
    """
    # A name is bytes: what is no UTF-8 is kept as it is.
    plain = not data.startswith(_UTF16) and b"\0" not in data
    if plain:
        text = data.decode("utf-8-sig", "surrogateescape")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    else:
        text = decode_text(data, where)
    header = text.partition("\n")[0]
    if any("path" in (x.strip().strip('"') for x in header.split(d)) for d in ",;\t"):
        return [
            find_name(folder, row["path"]) for row in read_table(data, ["path"], where)
        ]
    return [find_name(folder, line) for line in text.split("\n") if line.strip()]


def find_name(folder: Path, name: str) -> str:
    """The name of a file as a table or list has it -> as it is in the folder.

    Taken as it stands when there is such a file; else without blanks around it, without
    quotes, with slashes for backslashes, and bytes that are no UTF-8 as Windows-1252:
    the first that is there. A name that needs none of this is not looked for.
    """
    bare = name.strip()
    unquoted = bare[1:-1].replace('""', '"') if _is_quoted(bare) else bare
    candidates = [name, bare, unquoted, unquoted.replace("\\", "/")]
    if not unquoted.isascii():
        raw = os.fsencode(unquoted)
        if unquoted != raw.decode("utf-8", "replace"):
            western = raw.decode("cp1252", "replace")
            candidates += [western, western.replace("\\", "/")]
    if len(set(candidates)) > 1:
        for candidate in candidates:
            if os.path.isfile(folder / candidate):  # a name may be too long for one
                return candidate
    return bare


def _is_quoted(name: str) -> bool:
    return len(name) > 2 and name[0] == name[-1] == '"'
