"""Writing tensors piece by piece to where the layout wants them, and reading them back to be sure."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import mlx.core as mx

from convert.progress import Count, Progress
from convert.reading.stored import stored_tensors
from convert.writer.journal import Journal, Sums
from convert.writer.layout import Layout, Place
from olmo3_mlx.durable import flush
from olmo3_mlx.errors import CheckpointError, ConvertError

_READ_BYTES = 2**24  # at once, when a file is checked


class Output:
    """The files of a result in a folder: at their full size from the start, and filled piece by piece."""

    def __init__(
        self, folder: Path, layout: Layout, journal: Journal, progress: Progress | None = None
    ) -> None:
        """Make the files, or go on with those that are there: each weight that the journal records is
        checked, and its record forgotten if the bytes are others. `progress` counts the bytes that are
        checked, if any are. Raises OSError if the disk fails.
        """
        self._folder, self._layout, self._journal = folder, layout, journal
        self._sums: dict[str, hashlib._Hash] = {}  # of the weight being written
        self._written: dict[str, int] = {}
        for file, header in layout.headers.items():
            with (folder / file).open("r+b" if (folder / file).exists() else "x+b") as stream:
                stream.write(header)
                stream.truncate(layout.size(file))
        recorded = [name for sums in journal.done.values() for name in sums]
        count = self._count(recorded, progress if recorded else None)
        for weight, sums in list(journal.done.items()):
            if self._sums_now(sums, count) != sums:
                journal.forget(weight)

    def write(self, weight: str, piece: Mapping[str, mx.array]) -> None:
        """Write the next rows of the tensors that a weight becomes, evaluated. Pieces come weight by
        weight, and in order. Raises OSError if the disk does not take them.
        """
        for name, array in piece.items():
            data = memoryview(array.reshape(-1).view(mx.uint8))  # type: ignore[arg-type]
            self._sums.setdefault(name, hashlib.sha256()).update(data)
            start = self._written.get(name, 0)
            self._put(self._layout.places[name], start, data)
            self._written[name] = start + data.nbytes
        if all(self._written[name] == self._layout.places[name].spec.nbytes for name in piece):
            self._journal.record(weight, {name: total.hexdigest() for name, total in self._sums.items()})
            self._sums, self._written = {}, {}

    def finish(self, progress: Progress | None = None) -> None:
        """Flush everything to the disk, and read it back; `progress` counts its bytes. Raises ConvertError
        if what is read differs.
        """
        expected = {name: written for sums in self._journal.done.values() for name, written in sums.items()}
        assert expected.keys() == self._layout.places.keys()
        for file in self._layout.headers:
            flush(self._folder / file)
            _forget_cached(self._folder / file)
        now = self._sums_now(expected, self._count(expected, progress))
        bad = [name for name, read in now.items() if read != expected[name]]
        bad += [file for file in self._layout.headers if not self._as_laid_out(file)]
        if bad:
            raise ConvertError(
                f"what was read back differs from what was written, in {', '.join(bad[:5])}: the disk of "
                f"{self._folder.parent} cannot be trusted"
            )

    def _put(self, place: Place, start: int, data: memoryview) -> None:
        with (self._folder / place.file).open("r+b", buffering=0) as stream:
            stream.seek(place.offset + start)
            while data:
                data = data[stream.write(data) :]

    def _count(self, names: Iterable[str], progress: Progress | None) -> Count:
        return Count(sum(self._layout.places[name].spec.nbytes for name in names), progress)

    def _sums_now(self, names: Iterable[str], count: Count) -> Sums:
        """The SHA-256 of the bytes that the files hold now, for each tensor."""
        sums = {}
        for name in names:
            place, total = self._layout.places[name], hashlib.sha256()
            with (self._folder / place.file).open("rb", buffering=0) as stream:
                stream.seek(place.offset)
                left = place.spec.nbytes
                while left and (data := stream.read(min(left, _READ_BYTES))):
                    total.update(data)
                    left -= len(data)
                    count(len(data))
            sums[name] = total.hexdigest()
        return sums

    def _as_laid_out(self, file: str) -> bool:
        """Whether the header, parsed anew, says what the layout says."""
        try:
            tensors = stored_tensors(self._folder / file)
        except CheckpointError:
            return False
        laid_out = {n: p for n, p in self._layout.places.items() if p.file == file}
        return tensors.keys() == laid_out.keys() and all(
            (t.shape, t.dtype, t.offset)
            == (laid_out[n].spec.shape, laid_out[n].spec.dtype, laid_out[n].offset)
            for n, t in tensors.items()
        )


def _forget_cached(file: Path) -> None:
    """Ask the system to read a file from the disk next time, where it can be asked."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
