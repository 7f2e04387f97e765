"""The slate: memory in which a shape process finds the pixels of a job's pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ltx2_pool.words.pictures import MAX_PICTURES, Size, pixel_bytes


class Slate:
    """A file in memory that one process inherits. It has room for one job, and the worker writes it before each.

    It takes memory only once there was a picture. Raises OSError.
    """

    def __init__(self, sizes: Sequence[Size]) -> None:
        """`sizes`: those at which a picture lies there, one after the other; then the next picture."""
        self._each = pixel_bytes(sizes)
        self.fd = os.memfd_create("ltx2-pictures", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, MAX_PICTURES * self._each)
        except BaseException:
            self.close()
            raise

    def write(self, pixels: Sequence[int]) -> None:
        """Copy a job's pictures, one descriptor each, from the kernel's pages to the kernel's pages. Raises OSError."""
        os.lseek(self.fd, 0, os.SEEK_SET)
        for picture in pixels:
            done = 0
            while done < self._each:
                copied = os.sendfile(self.fd, picture, done, self._each - done)
                if not copied:
                    raise OSError(f"a picture has {done} bytes of pixels where {self._each} are needed")
                done += copied

    def close(self) -> None:
        """Let go of it; a process that has it keeps it."""
        os.close(self.fd)
