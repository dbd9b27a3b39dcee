# SPDX-License-Identifier: Apache-2.0
"""Reading a configuration: YAML, single values, and sections that go on after an error to find the others."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")

MAX_SOCKET_PATH = 107  # bytes of sun_path, unix(7)
MAX_WORKERS = 32  # SLICES_MAX of slices.h
# A file that no person has written must not keep a server busy, or say a million lines.
MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_ALIASES = 64  # none of which is within what has an anchor: so nothing multiplies
MAX_PROBLEMS = 200
MAX_UNKNOWN = 16  # keys of one section that are named


@dataclass(frozen=True, slots=True)
class Problem:
    """One error: where (``nat.pool.addresses[1]``, or line and column), and what is wrong with it."""

    path: str
    message: str


class ConfigError(Exception):
    """A configuration that cannot be used; ``str()`` is one line per problem."""

    def __init__(self, errors: Sequence[Problem], source: str = "config") -> None:
        self.errors = tuple(errors)
        self.source = source
        super().__init__(
            "\n".join(": ".join(filter(None, (source, problem.path, problem.message))) for problem in errors)
        )


# --- single values: each takes what stood in the file and returns the value, or raises ValueError ---------


_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 80


def shown(value: object) -> str:
    """A short form of any value; the file's author may have written anything, of any size."""
    if value is None:
        return "nothing"
    try:
        return _brief.repr(value)
    except ValueError:  # an integer of more digits than Python converts
        return "a number of very many digits"


def integer(low: int, high: int) -> Callable[[object], int]:
    def convert(value: object) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{shown(value)} is no whole number from {low} to {high}")
        return value

    return convert


def choice(allowed: Sequence[str]) -> Callable[[object], str]:
    def convert(value: object) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(
                f"{shown(value)} is none of: {', '.join(allowed)}{_did_you_mean(value, allowed)}"
            )
        return value

    return convert


def _did_you_mean(word: object, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, 1) if isinstance(word, str) and len(word) < 64 else []
    return f" (did you mean {close[0]}?)" if close else ""


def text_like(pattern: str, what: str) -> Callable[[object], str]:
    expression = re.compile(pattern, re.ASCII)

    def convert(value: object) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{shown(value)} is no text: {what}; write it in quotes")
        if not expression.fullmatch(value):
            raise ValueError(f"{shown(value)} is not allowed: {what}")
        return value

    return convert


an_instance = text_like(r"[A-Za-z0-9._-]{1,64}", "1 to 64 of A-Z a-z 0-9 . _ -")
a_device = text_like(
    r"[!-~][ -~]{0,254}", "a kernel interface or DPDK device arguments, up to 255 printable ASCII characters"
)
_OCTETS = r"\d{1,3}(?:\.\d{1,3}){3}"
_ipv4 = text_like(_OCTETS, "an IPv4 address, such as 198.51.100.254")
_cidr = text_like(_OCTETS + r"/\d{1,2}", "an IPv4 address and the length of its prefix, such as 10.0.0.1/24")
_hardware = text_like(r"[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5}", "a MAC, such as 02:00:00:00:00:01")


def an_address(value: object) -> IPv4Address:
    address = IPv4Address(_ipv4(value))
    if (
        address.is_multicast
        or address.is_loopback
        or address.is_reserved
        or address in IPv4Network("0.0.0.0/8")
    ):
        raise ValueError(f"{address} is no unicast address that packets are sent to")
    return address


def an_interface(value: object) -> IPv4Interface:
    interface = IPv4Interface(_cidr(value))
    an_address(str(interface.ip))
    host_in(interface.ip, interface.network)
    return interface


def a_network(value: object) -> IPv4Network:
    text = _cidr(value)
    network = IPv4Network(text, strict=False)
    if str(network.network_address) != text.split("/")[0]:
        raise ValueError(f"{text} has bits set behind its prefix: {network} is meant, or another length")
    return network


def a_mac(value: object) -> bytes:
    mac = bytes.fromhex(_hardware(value).replace(":", ""))
    if mac[0] & 1 or not any(mac):
        raise ValueError(f"{value} is no unicast MAC")
    return mac


def a_socket(value: object) -> Path:
    path = text_like(r"/[!-~]+", "an absolute path without spaces")(value)
    if len(path) > MAX_SOCKET_PATH:
        raise ValueError(f"{len(path)} bytes long, and a unix socket's path has {MAX_SOCKET_PATH} at most")
    return Path(path)


def a_port_range(value: object) -> tuple[int, int]:
    what = "ports such as 1024-65535, from 1 to 65535"
    text = (
        str(value)
        if type(value) is int and 0 < value < 1 << 16
        else text_like(r"\d{1,5}(?:-\d{1,5})?", what)(value)
    )
    first, _, last = text.partition("-")
    low, high = int(first), int(last or first)
    if not 1 <= low <= high <= 65535:
        raise ValueError(f"{shown(value)} is not allowed: {what}, the lower one first")
    return low, high


def port_ranges(most: int) -> Callable[[object], tuple[tuple[int, int], ...]]:
    """``A-B``, several with commas or as a list: ascending when read, whatever their order in the file."""

    def read(value: object) -> tuple[tuple[int, int], ...]:
        parts: list[object] = []
        for item in value if isinstance(value, list) else [value]:
            parts += [part.strip() for part in item.split(",")] if isinstance(item, str) else [item]
        found = sorted(a_port_range(part) for part in parts)
        if not 1 <= len(found) <= most:
            raise ValueError(f"{len(found)} port ranges, and 1 to {most} are possible")
        for (_, last), (first, _) in pairwise(found):
            if first <= last:
                raise ValueError(f"{first} is in two port ranges")
        return tuple(found)

    return read


def flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{shown(value)} is not allowed: true or false")
    return value


def the_cores(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_WORKERS:
        raise ValueError(f"{shown(value)} is not allowed: a list of 1 to {MAX_WORKERS} CPUs, such as [1, 2]")
    cores = tuple(integer(0, 1023)(cpu) for cpu in value)
    if twice := sorted({cpu for cpu in cores if cores.count(cpu) > 1}):
        raise ValueError(f"CPU {twice[0]} is listed twice, and a worker has a CPU of its own")
    return cores


def address_range(text: str) -> tuple[IPv4Address, IPv4Address]:
    """``A``, ``A-B`` or ``A/nn``."""
    if "/" in text:
        network = a_network(text)
        first, last = network[0], network[-1]
    else:
        a, dash, b = text.partition("-")
        first, last = IPv4Address(_ipv4(a.strip())), IPv4Address(_ipv4(b.strip() if dash else a.strip()))
    if last < first:
        raise ValueError(f"{text} is reversed: the lower address comes first")
    an_address(str(first))
    an_address(str(last))
    return first, last


def host_in(address: IPv4Address, subnet: IPv4Network) -> None:
    if address not in subnet:
        raise ValueError(f"{address} is not on the port's subnet {subnet}")
    if subnet.prefixlen < 31 and address in (subnet.network_address, subnet.broadcast_address):
        raise ValueError(f"{address} is the network or broadcast address of {subnet}")


# --- reading: a fallback stands in for what is wrong, so that the rest can be read too --------------------


class Reader:
    """Collects problems. ``keys`` has the keys of each kind of section, and whether each must be there."""

    def __init__(self, keys: Mapping[str, Mapping[str, bool]]) -> None:
        self._keys = keys
        self.problems: list[Problem] = []
        self._bad: set[str] = set()

    def fault(self, path: str, message: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(path, message))
        elif len(self.problems) == MAX_PROBLEMS:
            self.problems.append(Problem("", f"there are more errors than these {MAX_PROBLEMS}"))
        self._bad.add(path)

    def good(self, *paths: str) -> bool:
        """Whether these values, and all that they lie in, were read, so that comparing them makes sense."""
        for path in paths:
            while path:
                if path in self._bad:
                    return False
                path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return True

    def check(self, path: str, test: Callable[[], object]) -> None:
        try:
            test()
        except ValueError as error:
            self.fault(path, str(error))

    def section(self, path: str, value: object, kind: str) -> Section:
        known = self._keys[kind]
        if not isinstance(value, Mapping):
            self.fault(path, f"{shown(value)} is no mapping with the keys {', '.join(known)}")
            return Section(self, path, {})
        unknown = [key for key in value if key not in known]
        for key in unknown[:MAX_UNKNOWN]:
            where = f"{path}.{_key(key)}" if path else _key(key)
            self.fault(where, f"unknown key; allowed: {', '.join(known)}{_did_you_mean(key, list(known))}")
        if len(unknown) > MAX_UNKNOWN:
            self.fault(path, f"{len(unknown) - MAX_UNKNOWN} more unknown keys")
        section = Section(self, path, value)
        for key, required in known.items():
            if required and key not in value:
                self.fault(section.path(key), "missing")
        return section


def _key(key: object) -> str:
    return key if isinstance(key, str) and key.isprintable() and 0 < len(key) <= 64 else shown(key)


@dataclass(frozen=True, slots=True)
class Section:
    reader: Reader
    at: str
    values: Mapping[Any, Any]

    def path(self, key: str) -> str:
        return f"{self.at}.{key}" if self.at else key

    def get(self, key: str, convert: Callable[[object], T], fallback: T) -> T:
        if key in self.values:
            try:
                return convert(self.values[key])
            except ValueError as error:
                self.reader.fault(self.path(key), str(error))
        return fallback

    def section(self, key: str, kind: str) -> Section:
        if key not in self.values:  # reported already, if it must be there
            return Section(self.reader, self.path(key), {})
        return self.reader.section(self.path(key), self.values[key], kind)

    def items(self, key: str, most: int) -> Iterator[tuple[str, object]]:
        """(path, value) of each item of a list."""
        value = self.values.get(key, [])
        if not isinstance(value, list):
            self.reader.fault(self.path(key), f"{shown(value)} is no list")
        elif len(value) > most:
            self.reader.fault(self.path(key), f"{len(value)} entries, and {most} at most are possible")
        else:
            for i, item in enumerate(value):
                yield f"{self.path(key)}[{i}]", item


# --- files ------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: no key twice, and a MAC, a date or `off` stays the text that it looks like. Bounded."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._anchors = self._aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        is_alias = isinstance(event, yaml.AliasEvent)
        self._aliases += is_alias
        anchored = not is_alias and event.anchor is not None
        problem = (
            f"nested more than {MAX_DEPTH} deep"
            if self._depth >= MAX_DEPTH
            else f"more than {MAX_ALIASES} aliases"
            if self._aliases > MAX_ALIASES
            else "an alias within what has an anchor itself"
            if is_alias and self._anchors
            else ""
        )
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self._depth += 1
        self._anchors += anchored
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1
            self._anchors -= anchored


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
            key = loader.construct_object(key_node)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {shown(key)} stands here a second time",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
# YAML 1.1 reads 10:20:30:40:50:10 as a number to the base of 60, 010 as eight, and off as false.
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if not tag.endswith((":bool", ":int", ":float", ":timestamp"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"]
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), [*"-+0123456789"]
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+\.[0-9]*(?:[eE][-+][0-9]+)?$"), [*"-+0123456789"]
)


def _position(line: int, column: int) -> str:
    return f"line {line + 1}, column {column + 1}"


def _end_of(text: str) -> str:
    return _position(text.count("\n"), len(text) - text.rfind("\n") - 1)


def load_yaml(path: str | Path) -> dict[Any, Any]:
    """The mapping in a YAML file. Raises ConfigError, where it can with line and column, when there is none."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError((Problem("", f"cannot be read: {error.strerror}"),), str(path)) from None
    return parse_yaml(content, str(path))


def parse_yaml(content: bytes, source: str = "config") -> dict[Any, Any]:
    """The same for the bytes of a file."""

    def broken(where: str, what: str) -> ConfigError:
        return ConfigError((Problem(where, what),), source)

    if len(content) > MAX_BYTES:
        raise broken("", f"longer than {MAX_BYTES >> 20} MiB: this is no configuration")
    try:
        text = content.decode("utf-8-sig")
        document = yaml.load(text, _Loader)
    except UnicodeDecodeError as error:
        raise broken(_end_of(content[: error.start].decode()), "this is no UTF-8") from None
    except yaml.reader.ReaderError as error:
        raise broken(_end_of(text[: error.position]), "a character that YAML does not allow") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = _position(mark.line, mark.column) if mark else ""
        raise broken(where, f"broken YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise broken("", "broken YAML: nested too deeply") from None
    except (ValueError, LookupError, AttributeError, TypeError):  # what PyYAML lets through for `!!int x`
        raise broken("", "broken YAML: a tag or a number whose value cannot be read") from None
    if not isinstance(document, dict):
        raise broken("line 1, column 1", f"{shown(document)} is no mapping of keys to values")
    return document
