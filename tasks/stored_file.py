"""An object on S3 as a file, for libraries that read the end of a file first and then parts of it, as Parquet does."""

import io
import os

from tasks.storage import Store, StoredObject, read_range


class StoredFile(io.RawIOBase):
    """An object as a file to read from and seek in: each read fetches only its range. For objects that are never replaced."""

    def __init__(self, store: Store, stored: StoredObject) -> None:
        self._store, self._stored, self._at = store, stored, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._stored.size}[whence])
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        rest = self._stored.size - self._at
        wanted = min(rest, size) if size is not None and size >= 0 else rest
        if wanted <= 0:
            return b""
        fetched = read_range(self._store, self._stored.key, self._at, wanted)
        self._at += wanted
        return fetched
