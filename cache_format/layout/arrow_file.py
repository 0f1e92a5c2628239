"""One-batch Arrow IPC files: written plainly, read with the checks that a foreign file needs.

A reader of ours takes the schema and the batch as they follow each other from the start of the file (an IPC file is
an IPC stream between two magic words) and never follows the footer's offsets. Compressed bodies are refused, because
they say themselves how much memory they want.
"""

from __future__ import annotations

import io
import mmap
import os
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa

from cache_format.errors import CacheError, StorageError
from cache_format.storage.commit import committed
from cache_format.storage.paths import open_for_reading

_MAGIC = b"ARROW1\0\0"


def write_batch(path: Path, batch: pa.RecordBatch) -> None:
    """Commit ``batch`` as an Arrow IPC file, uncompressed.

    Raises:
        StorageError: the operating system refused.
    """
    with committed(path) as file:
        # pyarrow takes no notice of a write that stops short (a full disk, the 2 GiB limit of Linux); this one goes on.
        whole = io.BufferedWriter(file)
        with pa.ipc.new_file(whole, batch.schema) as writer:
            writer.write_batch(batch)
        whole.detach()


def read_batch(path: Path, schema: pa.Schema) -> tuple[pa.RecordBatch, dict[bytes, bytes]]:
    """The batch, memory-mapped, and the schema's metadata.

    Raises:
        CacheError: missing, damaged, compressed, with nulls, or of another schema.
        StorageError: the operating system refused.
    """
    # Opened once: a file that is moved away meanwhile is missing or whole, never half of each.
    descriptor = open_for_reading(path)
    try:
        data = pa.py_buffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
        if data.slice(0, len(_MAGIC)).to_pybytes() != _MAGIC:
            raise CacheError(path, "is not an Arrow file")
        messages = pa.ipc.MessageReader.open_stream(data.slice(len(_MAGIC)))
        found = pa.ipc.read_schema(messages.read_next_message())
        if not found.equals(schema):
            raise CacheError(path, f"does not have the columns {', '.join(schema.names)} of this format")
        message = messages.read_next_message()
        if _is_compressed(message.metadata.to_pybytes()):
            raise CacheError(path, "is compressed, which this format does not allow")
        batch = pa.ipc.read_record_batch(message, found)
        batch.validate(full=True)
    except StopIteration:
        raise CacheError(path, "is damaged: it has no record batch") from None
    except OSError as error:
        # pyarrow reports damaged content as OSError too; only a real refusal of the system has an errno.
        if error.errno is None:
            raise CacheError(path, f"is damaged: {error}") from None
        raise StorageError(path, "read", error) from error
    except (pa.ArrowException, struct.error, ValueError, EOFError, MemoryError) as error:
        raise CacheError(path, f"is damaged: {error}") from None
    finally:
        os.close(descriptor)
    if any(column.null_count for column in batch.columns):
        raise CacheError(path, "is damaged: it has nulls")
    return batch, dict(found.metadata or {})


def numbers(column: pa.Array) -> np.ndarray:
    """A column of numbers without a copy.

    Not ``to_numpy()``, whose first call imports pandas where that is installed: a fifth of a second.
    """
    dtype = np.dtype(column.type.to_pandas_dtype())
    if not len(column):
        return np.empty(0, dtype)
    return np.frombuffer(column.buffers()[1], dtype, len(column), column.offset * dtype.itemsize)


def _is_compressed(message: bytes) -> bool:
    """Whether a record batch message (a flatbuffer) has the field ``compression``.

    Message is {version, header_type, header, ...}, RecordBatch {length, nodes, buffers, compression}
    (https://github.com/apache/arrow/blob/main/format/Message.fbs); pyarrow verified the flatbuffer when it read it.
    """

    def field(table: int, number: int) -> int:
        """Offset of a table's field, 0 where it is absent."""
        vtable = table - struct.unpack_from("<i", message, table)[0]
        at = 4 + 2 * number
        if at >= struct.unpack_from("<H", message, vtable)[0]:
            return 0
        offset = struct.unpack_from("<H", message, vtable + at)[0]
        return table + offset if offset else 0

    root = struct.unpack_from("<I", message, 0)[0]
    header = field(root, 2)
    header += struct.unpack_from("<I", message, header)[0]
    return bool(field(header, 3))
