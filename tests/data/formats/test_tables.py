"""Tables and lists as spreadsheets and shells of any system write them."""

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultradino_jax.data.formats.tables import names_in_list, read_table

ROWS = [("img dir/a.png", "x", "München"), ("b.png", "y", "Ulm")]
WANTED = [dict(zip(("path", "label", "site"), row, strict=True)) for row in ROWS]


def text(sep=",", end="\n", tail="", head="path,label,site"):
    lines = [head.replace(",", sep), *(sep.join(row) for row in ROWS)]
    return "".join(line + tail + end for line in lines)


@pytest.mark.parametrize(
    "data",
    [
        text().encode(),
        b"\xef\xbb\xbf" + text(";", "\r\n").encode(),
        text("\t").encode("utf-16"),
        b"\xfe\xff" + text("\t").encode("utf-16-be"),
        text(end="\r").encode(),
        ("sep=;\r\n" + text(";", "\r\n")).encode(),
        text(tail=",").encode(),
        text(tail=",,,").encode(),
        text().encode("cp1252"),
        text().replace("x", " x\u00a0").encode(),
        (text() + "\n , ,\n").encode(),
        text().replace("b.png", '"b.png"').encode(),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_tables_of_any_make(data):
    assert read_table(data, ["path", "label"], "t") == WANTED


def test_what_is_wrong_is_named():
    for data, said in (
        (text().replace("y,", ",").encode(), "t, line 3: label is empty"),
        (text().replace(",x", "").encode(), "t, line 2: 2 values for 3 columns"),
        ((text() + "a,b,c,d\n").encode(), "t, line 4: 4 values for 3 columns"),
        (text().replace("a.png", "a\0.png").encode(), "t: not text: it holds a NUL"),
        (b"path,label\n\x81\x8d", "t: not text in UTF-8, UTF-16 or Windows-1252"),
        (b"path,path,label\na,b,c", "t: two columns are called 'path'"),
        (b"name,class\na,b", "no column 'path', 'label'; there are 'name', 'class'"),
        (b"path,label\n\n", "t: there is no row below the header"),
        (b"sep=::\npath,label\na,b", "t: the separator '::' is not one character"),
        (b'path,label\n"a' + b"x" * 140000 + b'",b', "t, line 2: field larger"),
    ):
        with pytest.raises(ValueError) as error:
            read_table(data, ["path", "label"], "t")
        assert said in str(error.value)


cells = st.text(
    st.characters(codec="utf-8", exclude_characters="\0\r\n", exclude_categories=["Cs"])
).map(str.strip)


@settings(deadline=None)
@given(
    st.lists(st.tuples(cells.filter(bool), cells.filter(bool)), min_size=1),
    st.sampled_from(",;\t"),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_what_python_s_csv_writes_is_read(rows, delimiter, encoding, end):
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter, lineterminator=end)
    writer.writerows([("path", "label"), *rows])
    found = read_table(buffer.getvalue().encode(encoding), ["path", "label"], "t")
    assert [tuple(row.values()) for row in found] == rows


def test_lists_of_any_make(tmp_path):
    names = ["sub dir/i 1.png", "end .png", "ü.png", "c,omma.png", "u\u2028x.png"]
    (tmp_path / "sub dir").mkdir()
    for name in names:
        (tmp_path / name).write_bytes(b"")
    plain = "\n".join(names)
    quoted = "\n".join(f'"{name}"' for name in names)
    table = "path,label\n" + "\n".join(f'"{name}",0' for name in names)
    western = "\n".join(name for name in names if "u" not in name)
    for data in (
        plain.encode(),
        "\ufeff".encode() + plain.replace("\n", "\r\n").encode(),
        plain.replace("\n", "\r\n").replace("/", "\\").encode(),
        plain.encode("utf-16"),
        quoted.encode(),
        table.encode(),
        f"\n{plain}\n\n".replace("\n", "  \n").encode(),
    ):
        assert names_in_list(data, tmp_path, "list") == names
    got = names_in_list(western.encode("cp1252"), tmp_path, "list")
    assert got == [name for name in names if "u" not in name]
    # A name that is none is kept as it is written, to be named when it is read.
    assert names_in_list(b"no\\where.png", tmp_path, "list") == ["no\\where.png"]
    assert names_in_list(b" lead.png", tmp_path, "list") == ["lead.png"]
    (tmp_path / " lead.png").write_bytes(b"")
    assert names_in_list(b" lead.png", tmp_path, "list") == [" lead.png"]
