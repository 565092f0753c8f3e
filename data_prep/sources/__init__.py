"""One reader a data set: (path, name) -> conversations and rejects; `name` is their source and begins their ids."""

from collections.abc import Callable, Iterator

from ..config import Format
from ..record import Record
from .alpaca import read_alpaca
from .hc3 import read_hc3
from .hh import read_hh
from .oasst import read_oasst
from .own import read_own
from .sharegpt import read_sharegpt

READERS: dict[Format, Callable[[str, str], Iterator[Record]]] = {
    Format.ALPACA: read_alpaca,
    Format.SHAREGPT: read_sharegpt,
    Format.HC3: read_hc3,
    Format.HH: read_hh,
    Format.OASST: read_oasst,
    Format.CONVERSATIONS: read_own,
}
