"""Read pickles without making any object of them: what they ask for becomes plain records.

Nothing of a pickle is imported, called or hashed, so it can run no code, and every byte of it makes
a bounded number of bytes in memory. Python's own unpicklers and torch's restricted one allocate
what a pickle claims: a memo of four billion entries, or a `bytearray` of any length.
"""

import codecs
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shards.documents import without_gc

# Takes a module and a name in it, and raises when it is not admitted.
Admit = Callable[[str, str], None]

_STOP = ord(".")
_MODULES = {"__builtin__": "builtins"}  # Python 2's name: Python 3's


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or a function, which is neither imported nor called."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


PERSISTENT = Global("", "persistent")  # what the pickle's file stores beside the pickle


@dataclass(slots=True, eq=False)
class Object:
    """What would be an instance of a class, or what a function would return."""

    kind: Global
    args: tuple[object, ...]
    state: object = None
    pairs: list[tuple[object, object]] | None = None  # items that were set, of a dict's subclass


class Pairs(list[tuple[object, object]]):
    """The items of a dict, in order; keys may be objects of any kind, and may stand there twice."""


def load(content: bytes, admit: Admit, start: int = 0) -> tuple[object, int, list[Object]]:
    """Read the pickle that begins at byte `start`.

    Returns:
        The object, the position of the byte after the pickle, and what the pickle wants of its
        file: objects of the kind PERSISTENT.

    Raises ValueError when the bytes are no whole pickle, and what `admit` raises.
    """
    machine = _Machine(content, admit, start)
    try:
        with without_gc():
            root = machine.run()
    except (IndexError, KeyError, TypeError, AttributeError, struct.error) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"no whole pickle at byte {machine.at}, {reason}") from None
    return root, machine.at, machine.persistent


class _Machine:
    """Run the operations of a pickle on a stack."""

    def __init__(self, content: bytes, admit: Admit, start: int) -> None:
        self.content, self.admit, self.at = content, admit, start
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below the marks
        self.memo: dict[int, Any] = {}
        self.persistent: list[Object] = []
        self.globals: dict[tuple[str, str], Global] = {}

    def run(self) -> object:
        content = self.content
        while (code := content[self.at]) != _STOP:
            self.at += 1
            _OPERATIONS[code](self)
        self.at += 1
        root: object = self.stack.pop()
        return root

    def take(self, length: int) -> bytes:
        """Return the next bytes. Raises IndexError when there are fewer."""
        start, self.at = self.at, self.at + length
        if length < 0 or self.at > len(self.content):
            raise IndexError("the end of the file")
        return self.content[start : self.at]

    def number(self, length: int) -> int:
        """Return the number without a sign in the next bytes."""
        return int.from_bytes(self.take(length), "little")

    def line(self) -> str:
        end = self.content.index(b"\n", self.at)
        text = self.content[self.at : end].decode()
        self.at = end + 1
        return text

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_to_mark()

    def put_tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("the stack is too short")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        pairs = list(zip(items[::2], items[1::2], strict=True))
        if type(target) is Pairs:
            target.extend(pairs)
        elif type(target) is Object:
            if target.pairs is None:
                target.pairs = []
            target.pairs.extend(pairs)
        else:
            raise TypeError(f"{type(target).__name__} in place of a dict")

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise TypeError(f"{type(target).__name__} in place of a list")
        target.extend(items)

    def find_global(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise TypeError("no name of a class")
        module = _MODULES.get(module, module)
        found = self.globals.get((module, name))
        if found is None:
            self.admit(module, name)
            found = self.globals[module, name] = Global(module, name)
        self.stack.append(found)

    def call(self) -> None:
        """Note the call of a function or class, with its arguments."""
        args, kind = self.stack.pop(), self.stack.pop()
        if type(kind) is not Global or type(args) is not tuple:
            raise TypeError("no call")
        self.stack.append(Object(kind, args))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is not Object:
            raise TypeError(f"{type(target).__name__} in place of an object")
        target.state = state

    def ask_file(self, name: object) -> None:
        found = Object(PERSISTENT, (name,))
        self.persistent.append(found)
        self.stack.append(found)

    def memoize(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    # The following three are done most often by far, and so without a call.

    def put_byte(self) -> None:
        self.stack.append(self.content[self.at])
        self.at += 1

    def get_short(self) -> None:
        self.stack.append(self.memo[self.content[self.at]])
        self.at += 1

    def memoize_next(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]


def _long(value: bytes) -> int:
    return int.from_bytes(value, "little", signed=True)


def _text(value: bytes) -> str:
    return value.decode(errors="replace")


def _quoted(text: str) -> str:
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "\"'":
        raise ValueError("no quoted text")
    return _text(codecs.escape_decode(text[1:-1].encode())[0])


def _integer(text: str) -> int | bool:
    return text == "01" if text in ("00", "01") else int(text.rstrip("L"))


_NAMED: dict[bytes, Callable[[_Machine], object]] = {
    b"\x80": lambda m: m.take(1),  # the protocol's number
    b"\x95": lambda m: m.take(8),  # the length of a frame
    # Values
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"I": lambda m: m.push(_integer(m.line())),
    b"L": lambda m: m.push(_integer(m.line())),
    b"J": lambda m: m.push(_long(m.take(4))),
    b"K": _Machine.put_byte,
    b"M": lambda m: m.push(m.number(2)),
    b"\x8a": lambda m: m.push(_long(m.take(m.number(1)))),
    b"\x8b": lambda m: m.push(_long(m.take(m.number(4)))),
    b"F": lambda m: m.push(float(m.line())),
    b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    b"S": lambda m: m.push(_quoted(m.line())),
    b"T": lambda m: m.push(_text(m.take(m.number(4)))),
    b"U": lambda m: m.push(_text(m.take(m.number(1)))),
    b"B": lambda m: m.push(m.take(m.number(4))),
    b"C": lambda m: m.push(m.take(m.number(1))),
    b"\x8e": lambda m: m.push(m.take(m.number(8))),
    b"\x96": lambda m: m.push(m.take(m.number(8))),
    b"V": lambda m: m.push(m.line().encode().decode("raw-unicode-escape")),
    b"X": lambda m: m.push(_text(m.take(m.number(4)))),
    b"\x8c": lambda m: m.push(_text(m.take(m.number(1)))),
    b"\x8d": lambda m: m.push(_text(m.take(m.number(8)))),
    # Containers
    b"(": _Machine.mark,
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.pop_to_mark())),
    b"\x85": lambda m: m.put_tuple(1),
    b"\x86": lambda m: m.put_tuple(2),
    b"\x87": lambda m: m.put_tuple(3),
    b"]": lambda m: m.push([]),
    b"l": lambda m: m.push(m.pop_to_mark()),
    b"a": lambda m: m.append([m.stack.pop()]),
    b"e": lambda m: m.append(m.pop_to_mark()),
    b"}": lambda m: m.push(Pairs()),
    b"s": lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    b"u": lambda m: m.set_items(m.pop_to_mark()),
    b"\x8f": lambda m: m.push([]),  # a set
    b"\x90": lambda m: m.append(m.pop_to_mark()),
    b"\x91": lambda m: m.push(m.pop_to_mark()),
    # Objects
    b"c": lambda m: m.find_global(m.line(), m.line()),
    b"\x93": lambda m: m.find_global(m.stack.pop(-2), m.stack.pop()),
    b"R": _Machine.call,
    b"\x81": _Machine.call,
    b"b": _Machine.build,
    b"P": lambda m: m.ask_file(m.line()),
    b"Q": lambda m: m.ask_file(m.stack.pop()),
    # The stack and the memo
    b"0": _Machine.pop,
    b"1": lambda m: m.pop_to_mark(),
    b"2": lambda m: m.push(m.stack[-1]),
    b"p": lambda m: m.memoize(int(m.line())),
    b"q": lambda m: m.memoize(m.number(1)),
    b"r": lambda m: m.memoize(m.number(4)),
    b"\x94": _Machine.memoize_next,
    b"g": lambda m: m.push(m.memo[int(m.line())]),
    b"h": _Machine.get_short,
    b"j": lambda m: m.push(m.memo[m.number(4)]),
}
_OPERATIONS = {code[0]: operation for code, operation in _NAMED.items()}
