"""What a backend relies on inside its host: written down as data, compared with what is there.

A ledger is the file `ledger.toml` in an engine's package:

    host = "transformers"                 # its name, for messages
    package = "transformers"              # its distribution
    tested = ["5.17", "5.23"]             # versions that the tests ran with, oldest first

    [used."transformers.masking_utils"]   # a group, and a module of the host
    create_causal_mask = { takes = "config layer_idx", why = "builds the mask of layers >= K" }

    [extended]                            # classes of ours that stand in for the host's
    "cache:PrunedLayer" = { bases = "transformers.cache_utils:DynamicLayer", new = "slots" }

A row stands for an `AttachPoint`, one of `extended` for an `Extension`, one with `targets` for
several points that are alike. Spaces separate several names. Groups have names of the backend's
own, so that it can check them at different times. What a class of ours redefines is not written
down: it is read off the class.
"""

from __future__ import annotations

import dis
import inspect
import logging
import pkgutil
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from types import FunctionType
from typing import Any, Literal, Self

from ep_core.errors import UnsupportedError
from ep_core.patching import missing_parameters

_MISSING = object()


@dataclass(frozen=True)
class AttachPoint:
    """One place where a backend depends on the inside of its host.

    Attributes:
        target: `"package.module:Qualified.name"` of a class, another callable, or a property.
        why: what the backend needs there.
        takes: parameters that the target must take, by name.
        reads: attributes that the class, or its objects, must have.
        until: what would make this entry unnecessary; "" for a public door.
        by: the function of ours that wraps the target, `"module:name"` in the backend's package.
    """

    target: str
    why: str
    takes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    until: str = ""
    by: str = ""


@dataclass(frozen=True)
class Extension:
    """A class of ours that stands in for the host's.

    Attributes:
        ours: `"package.module:Class"`.
        bases: the host's classes, in the same form, of which it redefines something.
        new: names that it has and they have not.
    """

    ours: str
    bases: tuple[str, ...]
    new: tuple[str, ...] = ()


@dataclass(frozen=True)
class PointStatus:
    """An attach point as found: `ok` with what it is for, or `FAILED` with a reason."""

    target: str
    state: Literal["ok", "FAILED"]
    detail: str

    def __str__(self) -> str:
        return f"{self.state}: {self.detail}"


@dataclass(frozen=True, eq=False)
class Ledger:
    """The ledger of one backend.

    Attributes:
        host: the engine's name.
        package: its distribution.
        tested: versions that the tests ran with, oldest first, each as precise as it matters.
        points: by group.
        extensions: what stands in for classes of the host's.
        home: the backend's package.
    """

    host: str
    package: str
    tested: tuple[str, ...]
    points: Mapping[str, tuple[AttachPoint, ...]]
    extensions: tuple[Extension, ...]
    home: str

    @classmethod
    def read(cls, home: str) -> Self:
        """Read the `ledger.toml` of a backend's package."""
        data = tomllib.loads(files(home).joinpath("ledger.toml").read_text(encoding="utf-8"))
        host, package, tested = data.pop("host"), data.pop("package"), tuple(data.pop("tested"))
        extensions = tuple(
            Extension(f"{home}.{ours}", **_fields(row))
            for ours, row in data.pop("extended", {}).items()
        )
        points = {
            group: tuple(
                AttachPoint(f"{module}{'.' if ':' in name else ':'}{name}", **_fields(row))
                for module, rows in modules.items()
                for label, row in rows.items()
                for name in row.pop("targets", label).split()
            )
            for group, modules in data.items()
        }
        return cls(host, package, tested, points, extensions, home)

    def __getitem__(self, target: str) -> AttachPoint:
        """The first entry of a target."""
        return next(point for point in self.all_points() if point.target == target)

    def all_points(self) -> Iterator[AttachPoint]:
        """Those of every group."""
        for points in self.points.values():
            yield from points

    def wrappers(self) -> Iterator[tuple[str, Callable[..., Any]]]:
        """Each target that is wrapped, with the function of ours that wraps it."""
        for point in self.all_points():
            if point.by:
                yield point.target, pkgutil.resolve_name(f"{self.home}.{point.by}")

    def check(self, *groups: str) -> list[PointStatus]:
        """Compare the ledger with the installed host, changing nothing.

        Args:
            groups: to check, `extended` among them; without any, the whole ledger.
        """
        statuses: list[PointStatus] = []
        for group in groups or (*self.points, "extended"):
            if group == "extended":
                for extension in self.extensions:
                    statuses += check_extension(extension)
            else:
                statuses += map(check_point, self.points[group])
        return statuses

    def require(self, statuses: Iterable[PointStatus]) -> None:
        """Refuse a host that is not as the backend needs it.

        Raises:
            UnsupportedError: naming the first point that does not fit.
        """
        for status in statuses:
            if status.state == "FAILED":
                raise UnsupportedError(
                    f"this {self.host} ({version(self.package)}, tested is {self._tested}) does "
                    f"not fit: {status.target}: {status.detail}; run entropyprune doctor"
                )

    def warn_if_untested(self) -> None:
        """Say once in a process that the installed version is older or newer than the tested."""
        installed = version(self.package)
        first, last = (_numbers(self.tested[i]) for i in (0, -1))
        number = _numbers(installed)
        if not (first <= number[: len(first)] and number[: len(last)] <= last):
            _warn_once(
                f"pruning was never tested with {self.host} {installed}, tested is {self._tested}; "
                "entropyprune doctor checks each place that it relies on"
            )

    @property
    def _tested(self) -> str:
        return " to ".join(dict.fromkeys((self.tested[0], self.tested[-1])))


def _fields(row: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a row, those that hold several names split."""
    several = ("takes", "reads", "bases", "new")
    return {key: tuple(text.split()) if key in several else text for key, text in row.items()}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


@cache
def _warn_once(message: str) -> None:
    logging.getLogger("entropyprune").warning(message)


def check_point(point: AttachPoint) -> PointStatus:
    """Resolve an attach point and look for what it must have, changing nothing."""
    try:
        target = pkgutil.resolve_name(point.target)
    except Exception as error:  # importing a host can raise anything: a missing driver, say
        return PointStatus(point.target, "FAILED", f"not found: {error}")
    if isinstance(target, property):
        return PointStatus(point.target, "ok", point.why)
    if not callable(target):
        return PointStatus(point.target, "FAILED", "it is no callable any more")
    if point.takes and (missing := missing_parameters(target, point.takes)):
        return _no_longer_takes(point.target, missing)
    if missing := _missing_attributes(target, point.reads):
        return PointStatus(point.target, "FAILED", f"it has no {', '.join(missing)} any more")
    reads = f" ({', '.join(point.reads)})" if point.reads else ""
    return PointStatus(point.target, "ok", point.why + reads)


def check_extension(extension: Extension) -> Iterator[PointStatus]:
    """Has the host each name that a class of ours redefines, and none of those that are new?"""
    try:
        bases = {name: pkgutil.resolve_name(name) for name in extension.bases}
        ours = pkgutil.resolve_name(extension.ours)
    except Exception as error:  # as above
        yield PointStatus(extension.ours, "FAILED", f"cannot be made: {error}")
        return
    for name, member in vars(ours).items():
        if name.startswith(("__", "_abc_", "_is_protocol")):
            continue
        found = (base for base, host in bases.items() if not _missing_attributes(host, (name,)))
        base = next(found, extension.bases[0])
        yield _check_member(ours, bases[base], f"{base}.{name}", member, name in extension.new)


def _check_member(ours: type, base: type, target: str, member: Any, new: bool) -> PointStatus:
    """Is a name of ours in the host's class as it must be?"""
    name = target.rpartition(".")[2]
    if new:
        if _missing_attributes(base, (name,)):
            return PointStatus(target, "ok", f"new in {ours.__name__}; the host has none")
        return PointStatus(target, "FAILED", f"{ours.__name__} has another of the same name")
    code = isinstance(member, FunctionType | property)
    why = (inspect.getdoc(member) or "").partition("\n")[0] if code else "a setting"
    host = inspect.getattr_static(base, name, _MISSING)
    if host is _MISSING:
        return PointStatus(target, "FAILED", f"not found; {ours.__name__} redefines it: {why}")
    if isinstance(member, property) != isinstance(host, property):
        return PointStatus(target, "FAILED", "it is no property any more, or has become one")
    if isinstance(member, FunctionType):
        if not callable(host):
            return PointStatus(target, "FAILED", "it is no callable any more")
        if missing := missing_parameters(host, _own_parameters(member)):
            return _no_longer_takes(target, missing)
    return PointStatus(target, "ok", why)


def _own_parameters(method: FunctionType) -> tuple[str, ...]:
    """Names of a method's parameters, without `self`."""
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def _no_longer_takes(target: str, missing: list[str]) -> PointStatus:
    return PointStatus(target, "FAILED", f"its signature no longer takes {', '.join(missing)}")


def _missing_attributes(owner: Any, names: tuple[str, ...]) -> list[str]:
    """Which of these names a class neither has nor gives to its objects."""
    missing = {name for name in names if not hasattr(owner, name)}
    if missing and isinstance(owner, type):
        for each in inspect.getmro(owner)[:-1]:
            missing -= _given_to_objects(each)
    return [name for name in names if name in missing]


def _given_to_objects(owner: type) -> set[str]:
    """Attributes that a class declares, or that its own methods set."""
    methods = [inspect.unwrap(m) for m in vars(owner).values() if inspect.isfunction(m)]
    return {
        *inspect.get_annotations(owner),
        *(
            str(step.argval)
            for method in methods
            for step in dis.get_instructions(method)
            if step.opname == "STORE_ATTR"
        ),
    }
