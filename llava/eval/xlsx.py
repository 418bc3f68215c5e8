"""The little of the .xlsx format that a submission needs: one sheet of text and numbers, written and read back.

In: rows as dicts. Out: a file that spreadsheets and MMBench's server open, and the other way round. An .xlsx file is a zip
archive of XML; the package that knows all of it would be a dependency for one task.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from llava.errors import InputError

MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_HEAD = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
_TYPES = "application/vnd.openxmlformats-officedocument.spreadsheetml"
_RELATION = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_PARTS = {
    "[Content_Types].xml": f'<Types xmlns="{_PACKAGE}/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Default Extension="xml" ContentType="application/xml"/>'
    f'<Override PartName="/xl/workbook.xml" ContentType="{_TYPES}.sheet.main+xml"/>'
    f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{_TYPES}.worksheet+xml"/></Types>',
    "_rels/.rels": f'<Relationships xmlns="{_PACKAGE}/relationships">'
    f'<Relationship Id="rId1" Type="{_RELATION}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
    "xl/workbook.xml": f'<workbook xmlns="{MAIN}" xmlns:r="{_RELATION}"><sheets>'
    '<sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
    "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{_PACKAGE}/relationships">'
    f'<Relationship Id="rId1" Type="{_RELATION}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
}
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # XML has no way to write these


def write_xlsx(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    lines = [list(columns), *([row.get(column, "") for column in columns] for row in rows)]
    body = "".join(f"<row>{''.join(map(_cell, line))}</row>" for line in lines)
    sheet = f'<worksheet xmlns="{MAIN}"><sheetData>{body}</sheetData></worksheet>'
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in {**_PARTS, "xl/worksheets/sheet1.xml": sheet}.items():
            archive.writestr(name, _HEAD + text)


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "<c/>"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"<c><v>{value}</v></c>"
    text = escape(_FORBIDDEN.sub("", str(value)))
    return f'<c t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'


def read_xlsx(path: Path) -> list[dict[str, str]]:
    """The first sheet's rows by the names in its first row; numbers come as they are written, empty cells as ""."""
    try:
        with zipfile.ZipFile(path) as archive:
            shared = _shared_strings(archive)
            name = min((name for name in archive.namelist() if name.startswith("xl/worksheets/sheet")), default="")
            sheet = ElementTree.fromstring(archive.read(name))
    except FileNotFoundError:
        raise InputError(f"there is no table {str(path)!r}") from None
    except (zipfile.BadZipFile, KeyError, ElementTree.ParseError) as error:
        raise InputError(f"{str(path)!r} is not an .xlsx table that can be read: {error}") from error
    lines = [_row(row, shared) for row in sheet.iter(f"{{{MAIN}}}row")]
    if not lines:
        return []
    header = lines[0]
    return [{header[place]: line.get(place, "") for place in header} for line in lines[1:]]


def _shared_strings(archive: zipfile.ZipFile) -> list[str]:
    if "xl/sharedStrings.xml" not in archive.namelist():
        return []
    table = ElementTree.fromstring(archive.read("xl/sharedStrings.xml"))
    return ["".join(text.text or "" for text in entry.iter(f"{{{MAIN}}}t")) for entry in table]


def _row(row: ElementTree.Element, shared: list[str]) -> dict[int, str]:
    cells: dict[int, str] = {}
    place = -1
    for cell in row.iter(f"{{{MAIN}}}c"):
        reference = re.match("[A-Z]+", cell.get("r", ""))
        place = _column(reference[0]) if reference else place + 1
        if cell.get("t") == "inlineStr":
            cells[place] = "".join(text.text or "" for text in cell.iter(f"{{{MAIN}}}t"))
        else:
            value = cell.findtext(f"{{{MAIN}}}v") or ""
            cells[place] = shared[int(value)] if cell.get("t") == "s" and value else value
    return {place: text for place, text in cells.items() if text != ""}


def _column(letters: str) -> int:
    number = 0
    for letter in letters:
        number = number * 26 + ord(letter) - ord("A") + 1
    return number - 1
