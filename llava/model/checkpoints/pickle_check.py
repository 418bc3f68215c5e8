"""Check the pickles of a `.bin` file before anything reads them: they name nothing but tensors, and state no large numbers.

In: a file that torch may have written, as a zip archive or, before 1.6, as pickles one after another. Out: nothing, or an
`UnpicklingError` with the reason. Unpicklers take memory for the numbers that a pickle states: for an index of 2^31 in the
table of objects, or for a call of `bytearray`, it takes gigabytes for a hundred bytes of file.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO

MAX_PICKLE_BYTES = 2**22  # of the table of a file's tensors, 150 bytes each or so
NUM_LEGACY_PICKLES = 5  # a number, a version, the machine, the table of tensors, the keys of their data

PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
UNUSED = ("BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEWOBJ_EX")


def check_pickle_file(file: Path, known: Collection[tuple[str, str]]) -> None:
    """Check a `.bin` file; `known` are the names, as (module, name), that its pickles may refer to.

    Raises:
        pickle.UnpicklingError: It names something else, or takes more memory than it has bytes.
        zipfile.BadZipFile, ValueError, EOFError: It is damaged.
    """
    if not zipfile.is_zipfile(file):
        with file.open("rb") as stream:
            begin = io.BytesIO(stream.read(2 * MAX_PICKLE_BYTES))  # a length in a pickle is then no reason to read on
        for _ in range(NUM_LEGACY_PICKLES):
            check_pickle(begin, known)
        return
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise pickle.UnpicklingError("its members are compressed, which torch does not do")
        if sum(member.file_size for member in members) > file.stat().st_size:
            raise pickle.UnpicklingError("its members overlap, so that they are larger together than the file")
        for member in members:
            if member.filename.rpartition("/")[2] == "data.pkl":
                if member.file_size > MAX_PICKLE_BYTES:
                    raise pickle.UnpicklingError(f"its table of tensors has more than {MAX_PICKLE_BYTES} bytes")
                check_pickle(io.BytesIO(archive.read(member)), known)


def check_pickle(stream: IO[bytes], known: Collection[tuple[str, str]]) -> None:
    """Check the pickle that begins at the stream's position, and leave the stream at its end."""
    num_puts, begin = 0, stream.tell()
    for opcode, argument, _ in pickletools.genops(stream):
        if stream.tell() - begin > MAX_PICKLE_BYTES:
            raise pickle.UnpicklingError(f"its table of tensors has more than {MAX_PICKLE_BYTES} bytes")
        if opcode.name in PUTS:
            # Objects are numbered in their order, from 0, or from 1 by Python 2.
            if not isinstance(argument, int) or argument > num_puts + 1:
                raise pickle.UnpicklingError(
                    f"it numbers its object {num_puts} as {argument}, which takes memory for as many"
                )
            num_puts += 1
        elif opcode.name == "GLOBAL" and tuple(str(argument).split(" ", 1)) not in known:
            raise pickle.UnpicklingError(f"it names {str(argument).replace(' ', '.')}, which no table of tensors needs")
        elif opcode.name in UNUSED:
            raise pickle.UnpicklingError(f"it has the instruction {opcode.name}, which no table of tensors needs")
