# SPDX-License-Identifier: Apache-2.0
"""Hidden states of examples on disk, found again by the examples' tokens."""

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from keylayers.errors import ConfigError
from keylayers.ranking.budget import GIB


@dataclass(frozen=True)
class Example:
    """One example of a batch.

    Attributes:
        start: Its first position in the batch.
        length: Its tokens.
        digest: Of its tokens and their positions.
    """

    start: int
    length: int
    digest: bytes


def examples_of(ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> list[Example] | None:
    """The examples of a batch; None if padding is not at its ends."""
    ids = ids.cpu()
    mask = torch.ones_like(ids) if mask is None else mask.cpu()
    if mask.shape != ids.shape:
        return None
    positions = None if positions is None else positions.cpu().expand(ids.shape)
    found = []
    for row in range(len(ids)):
        places = mask[row].nonzero().flatten()
        if len(places) == 0 or places[-1] - places[0] + 1 != len(places):
            return None
        start, length = int(places[0]), len(places)
        own = ids if positions is None else positions
        parts = [torch.tensor([start]), ids[row, places], own[row, places]]
        content = torch.cat([one.long() for one in parts]).numpy().tobytes()
        found.append(Example(start, length, hashlib.sha256(content).digest()))
    return found


class HiddenStates:
    """Hidden states on disk, example by example, in a file of fixed size without a name.

    Args:
        max_gib: Size of the file.
        folder: Where it lies; None where temporary files go.
        width: Of a hidden state.

    Raises:
        ConfigError: the disk has not that much room.
    """

    def __init__(self, max_gib: float, folder: Path | None, width: int) -> None:
        self._num_bytes = int(max_gib * GIB)
        self._width = width
        self._places: dict[bytes, int] = {}
        self._used = 0
        file, name = tempfile.mkstemp(prefix="keylayers-cache-", dir=folder)
        try:
            _reserve(file, self._num_bytes)
            self._bytes = torch.from_file(
                name, shared=True, size=self._num_bytes, dtype=torch.uint8
            )
        except OSError as error:
            raise ConfigError(
                f"`prefix_cache_gib` must fit on the disk, but {max_gib:g} GiB do not: "
                f"{error.strerror}"
            ) from error
        finally:
            os.close(file)
            os.unlink(name)

    def _values(self, place: int, length: int, dtype: torch.dtype) -> Tensor:
        size = length * self._width * dtype.itemsize
        return self._bytes[place : place + size].view(dtype).view(length, self._width)

    def read(self, rows: list[Example] | None, ids: Tensor) -> Tensor | None:
        """Hidden states of the batch, zero at padding; None if an example is missing."""
        if rows is None or any(row.digest not in self._places for row in rows):
            return None
        hidden = torch.zeros(*ids.shape, self._width, dtype=self._dtype)
        for place, row in enumerate(rows):
            values = self._values(self._places[row.digest], row.length, self._dtype)
            hidden[place, row.start : row.start + row.length] = values
        return hidden.to(ids.device)

    def write(self, rows: list[Example], hidden: Tensor) -> None:
        """Keep the examples that are new, as long as there is room."""
        self._dtype = hidden.dtype
        for place, row in enumerate(rows):
            size = row.length * self._width * hidden.element_size()
            if row.digest in self._places or self._used + size > self._num_bytes:
                continue
            own = hidden[place, row.start : row.start + row.length]
            self._values(self._used, row.length, hidden.dtype).copy_(own)
            self._places[row.digest] = self._used
            self._used += size


def _reserve(file: int, num_bytes: int) -> None:
    """Take the room now: a disk that is full later would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, num_bytes)
    else:  # macOS
        os.ftruncate(file, num_bytes)


def relative_error(found: Tensor, computed: Tensor, rows: list[Example]) -> float:
    """Size of the difference at the tokens, as a share of the size of what was computed."""
    differences, sizes = 0.0, 0.0
    for place, row in enumerate(rows):
        own = slice(row.start, row.start + row.length)
        new = computed[place, own].double()
        differences += float((found[place, own].double() - new).square().sum())
        sizes += float(new.square().sum())
    return (differences / sizes) ** 0.5
