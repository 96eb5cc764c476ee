"""Pickles read without running anything: what PyTorch and OLMo-core write becomes inert stand-ins.

The standard unpickler imports what a pickle names, calls it, and sets attributes on it. This one knows
some forty opcodes. A global is looked up in the caller's list and stays a name; a call of it is kept as
`Call(name, args)`, and the attributes that it would get as `Call.state`. Nothing is imported or called, and
no object but the results' own dictionaries and lists is changed.

Opcodes: https://docs.python.org/3/library/pickletools.html
"""

import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

_MARK = object()


class UnpickleError(ValueError):
    """A pickle that is damaged, or that names or does what is not admitted. Says what."""


@dataclass(frozen=True)
class Global:
    """Something importable that a pickle names, "torch.float32" say. It was not imported."""

    name: str


@dataclass(eq=False)
class Call:
    """A call of a global, which was not done. Only the same object is equal, so that it can be a key.

    `state` is the value that the attributes would have been set from, a dictionary as a rule, or None.
    """

    name: str
    args: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True)
class Persistent:
    """The id of an object outside of the pickle; PyTorch's tensors keep their storages so."""

    id: Any


# Calls whose results Python has itself, or that are of no interest; all others are kept as Call.
_PLAIN: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": lambda args: {},
    "torch.Size": lambda args: _tuple(*args),
}


def _tuple(value: Any) -> tuple[Any, ...]:
    if type(value) is not tuple:  # anything else would be copied, at each of many calls
        raise TypeError
    return value


def unpickle(data: bytes, allowed: Collection[str], most: int) -> Any:
    """The value in `data`, at most `most` bytes. `allowed` are the globals that it may name.

    Raises UnpickleError, and then names the global or opcode that is refused.
    """
    if len(data) > most:
        raise UnpickleError(f"is {len(data):,} bytes long, expected at most {most:,}")
    try:
        return _Machine(data, allowed).run()
    except UnpickleError:
        raise
    except (IndexError, struct.error):
        raise UnpickleError("is cut short") from None
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise UnpickleError(f"is damaged ({type(error).__name__})") from None


class _Machine:
    """Stack, memo and position. Memory is bounded by the pickle's length: an opcode makes one object."""

    def __init__(self, data: bytes, allowed: Collection[str]) -> None:
        self.data = data
        self.allowed = allowed
        self.at = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.names: dict[str, Global] = {}

    def run(self) -> Any:
        """Read opcodes up to STOP."""
        while True:
            opcode = self.data[self.at]
            self.at += 1
            if opcode == _STOP:
                return self.pop()
            step = _STEPS.get(opcode)
            if step is None:
                raise UnpickleError(f"uses the opcode {bytes([opcode])!r}, which is not admitted")
            step(self)

    def number(self, form: str) -> Any:
        """Read the next number, in a format of `struct`."""
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def take(self, form: str) -> bytes:
        """Read the next bytes, which follow their count in a format of `struct`."""
        count = self.number(form)
        begin, self.at = self.at, self.at + count
        return self.data[begin : self.at]  # if there are fewer, the next opcode is not there either

    def line(self) -> str:
        """Read up to the next line feed."""
        end = self.data.index(b"\n", self.at)
        text = self.data[self.at : end].decode()
        self.at = end + 1
        return text

    def push(self, value: Any) -> None:
        """Put a value onto the stack."""
        self.stack.append(value)

    def pop(self) -> Any:
        """Take a value off the stack; marks are no values."""
        value = self.stack.pop()
        if value is _MARK:
            raise IndexError
        return value

    def to_mark(self) -> list[Any]:
        """Take off the values that were pushed since the last mark, and the mark."""
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                values = self.stack[place + 1 :]
                del self.stack[place:]
                return values
        raise IndexError

    def last(self, count: int) -> tuple[Any, ...]:
        """Take off the last `count` values, in the order in which they were pushed."""
        values = [self.pop() for _ in range(count)]
        return tuple(reversed(values))

    def top(self, kind: type) -> Any:
        """The value on top, which must be just of this type."""
        value = self.stack[-1]
        if type(value) is not kind:
            raise UnpickleError(f"changes a {type(value).__name__}, expected a {kind.__name__}")
        return value

    def name(self, module: Any, name: Any) -> None:
        """Push a global, if it is admitted."""
        if type(module) is not str or type(name) is not str:  # nested tuples print for ever
            raise UnpickleError(
                f"names a {type(module).__name__} and a {type(name).__name__}, expected texts"
            )
        full = f"{module}.{name}"
        if full not in self.allowed:
            raise UnpickleError(f"names {full[:200]!r}, which is not on the short list of what may be in it")
        self.push(self.names.setdefault(full, Global(full)))

    def call(self) -> None:
        """REDUCE and NEWOBJ: keep the call that would have been done."""
        called, args = self.last(2)
        if type(called) is not Global or type(args) is not tuple:
            raise UnpickleError(f"calls a {type(called).__name__}, expected a global that is admitted")
        plain = _PLAIN.get(called.name)
        self.push(plain(args) if plain else Call(called.name, args))

    def build(self) -> None:
        """BUILD: keep the state that would have been set."""
        state = self.pop()
        self.top(Call).state = state

    def set_items(self, items: list[Any]) -> None:
        """Keys and values in turn. A key is flat: hashing nested tuples takes for ever, or overflows C's
        stack. Whole numbers are small: of large ones any number can have one hash.
        """
        target: dict[Any, Any] = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int, Call):
                raise UnpickleError(f"has a {type(key).__name__} as a key")
            if type(key) is int and key.bit_length() > 32:
                raise UnpickleError("has a whole number of more than 32 bits as a key")
            target[key] = value

    def append(self, values: list[Any]) -> None:
        """Append values to the list on top."""
        self.top(list).extend(values)

    def remember(self, place: int) -> None:
        """Keep the value on top in the memo."""
        if self.stack[-1] is _MARK:
            raise IndexError
        self.memo[place] = self.stack[-1]


_STOP = ord(".")
_STEPS: dict[int, Callable[[_Machine], Any]] = {
    code[0]: step
    for code, step in {
        b"\x80": lambda m: m.number("<B"),  # PROTO
        b"\x95": lambda m: m.number("<Q"),  # FRAME
        b"(": lambda m: m.push(_MARK),
        b"N": lambda m: m.push(None),
        b"\x88": lambda m: m.push(True),
        b"\x89": lambda m: m.push(False),
        b"J": lambda m: m.push(m.number("<i")),
        b"K": lambda m: m.push(m.number("<B")),
        b"M": lambda m: m.push(m.number("<H")),
        b"\x8a": lambda m: m.push(int.from_bytes(m.take("<B"), "little", signed=True)),
        b"G": lambda m: m.push(m.number(">d")),
        b"X": lambda m: m.push(m.take("<I").decode("utf-8", "surrogatepass")),
        b"\x8c": lambda m: m.push(m.take("<B").decode("utf-8", "surrogatepass")),
        b"B": lambda m: m.push(m.take("<I")),
        b"C": lambda m: m.push(m.take("<B")),
        b"]": lambda m: m.push([]),
        b"}": lambda m: m.push({}),
        b")": lambda m: m.push(()),
        b"t": lambda m: m.push(tuple(m.to_mark())),
        b"\x85": lambda m: m.push(m.last(1)),
        b"\x86": lambda m: m.push(m.last(2)),
        b"\x87": lambda m: m.push(m.last(3)),
        b"a": lambda m: m.append([m.pop()]),
        b"e": lambda m: m.append(m.to_mark()),
        b"s": lambda m: m.set_items(list(m.last(2))),
        b"u": lambda m: m.set_items(m.to_mark()),
        b"q": lambda m: m.remember(m.number("<B")),
        b"r": lambda m: m.remember(m.number("<I")),
        b"\x94": lambda m: m.remember(len(m.memo)),
        b"h": lambda m: m.push(m.memo[m.number("<B")]),
        b"j": lambda m: m.push(m.memo[m.number("<I")]),
        b"c": lambda m: m.name(m.line(), m.line()),
        b"\x93": lambda m: m.name(*m.last(2)),
        b"R": lambda m: m.call(),
        b"\x81": lambda m: m.call(),
        b"b": lambda m: m.build(),
        b"Q": lambda m: m.push(Persistent(m.pop())),
    }.items()
}
