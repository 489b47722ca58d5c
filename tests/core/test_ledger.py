"""A ledger is read as it is written, and whatever a host changes of it is found."""

import logging
import sys
import types
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ep_core import ledger
from ep_core.errors import UnsupportedError
from ep_core.ledger import (
    AttachPoint,
    Extension,
    Ledger,
    PointStatus,
    check_extension,
    check_point,
)

from ..ledgers import changes, planted, redefined, renamed  # noqa: TID252 # no installed package

LEDGER = """
host = "A Host"
package = "a-host"
tested = ["1.2", "1.4"]

[wrapped."a_host"."Engine.forward"]
by = "hooks:around"
takes = "hidden mask"
why = "drops tokens"
until = "a hook exists"

[used."a_host"]
prefill = { why = "called" }
both = { targets = "Engine.Slots Engine.forward", why = "said once" }

[used."a_host.layers"]
"decoder:Layer.forward" = { takes = "hidden", why = "hooked" }

[extended]
"hooks:Ours" = { bases = "a_host:Engine a_host:Engine.Slots", new = "drop keep" }
"""


class Engine:
    """A class as an engine has it."""

    declared: int
    limit = 3

    def forward(self, hidden, *, mask=None):
        self.given_by_a_method = self.only_read = hidden
        return self.only_read_too

    @contextmanager
    def graph(self):
        self.given_in_a_context = 1
        yield

    @property
    def used(self):
        """The host's words."""
        return 1


@dataclass
class Batch:
    """A dataclass of a host's."""

    tokens: int
    lengths: list


class Wider:
    """A second class that one of ours may extend."""

    def replay(self, batch):
        """Replays."""


@pytest.fixture
def host(monkeypatch):
    """A module `a_host` as an engine would install it."""
    module = types.ModuleType("a_host")

    def prefill(tokens, positions, /, layer, **options):
        return tokens

    for name, value in (("Engine", Engine), ("Batch", Batch), ("Wider", Wider)):
        setattr(module, name, type(name, value.__bases__, dict(vars(value))))
    module.prefill, module.VERSION = prefill, "1.0"
    monkeypatch.setitem(sys.modules, "a_host", module)
    return module


@pytest.fixture
def backend(tmp_path, monkeypatch):
    """A package `a_backend` with a ledger."""
    folder = tmp_path / "a_backend"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "ledger.toml").write_text(LEDGER)
    (folder / "hooks.py").write_text("def around(original): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in ("a_backend", "a_backend.hooks"):
        sys.modules.pop(name, None)


# The file.


def test_a_ledger_is_read_as_it_is_written(backend):
    read = Ledger.read("a_backend")
    assert (read.host, read.package, read.tested) == ("A Host", "a-host", ("1.2", "1.4"))
    assert read.points["wrapped"] == (
        AttachPoint(
            "a_host:Engine.forward",
            "drops tokens",
            takes=("hidden", "mask"),
            until="a hook exists",
            by="hooks:around",
        ),
    )
    assert [point.target for point in read.points["used"]] == [
        "a_host:prefill",
        "a_host:Engine.Slots",
        "a_host:Engine.forward",
        "a_host.layers.decoder:Layer.forward",
    ]
    assert read.extensions == (
        Extension(
            "a_backend.hooks:Ours", ("a_host:Engine", "a_host:Engine.Slots"), ("drop", "keep")
        ),
    )
    assert read["a_host.layers.decoder:Layer.forward"].takes == ("hidden",)


def test_what_is_wrapped_is_found_with_the_function_that_wraps_it(backend):
    ((target, wrapper),) = Ledger.read("a_backend").wrappers()
    import a_backend.hooks

    assert (target, wrapper) == ("a_host:Engine.forward", a_backend.hooks.around)


@pytest.mark.parametrize(
    ("was", "is_now"), [("takes = ", "take = "), ("why = ", "reason = "), ("bases = ", "base = ")]
)
def test_a_misspelt_field_is_no_field(backend, was, is_now):
    (backend / "ledger.toml").write_text(LEDGER.replace(was, is_now))
    with pytest.raises(TypeError, match=is_now.split()[0]):
        Ledger.read("a_backend")


# A point.


def point(target, takes=(), reads=()):
    return AttachPoint(target, "reads the layer", tuple(takes), tuple(reads))


def test_a_point_that_fits_is_ok_and_says_why_it_is_needed(host):
    status = check_point(point("a_host:Engine.forward", ["hidden", "mask"]))
    assert (status.target, status.state) == ("a_host:Engine.forward", "ok")
    assert str(status) == "ok: reads the layer"


@pytest.mark.parametrize(
    "target", ["no_such_host:run", "a_host:gone", "a_host:Engine.gone", "a_host:gone.forward"]
)
def test_a_point_that_is_gone_fails_and_says_what_is_missing(host, target):
    status = check_point(point(target))
    assert status.state == "FAILED"
    assert str(status).startswith("FAILED: not found: ")
    assert "gone" in status.detail or "no_such_host" in status.detail


def test_a_point_whose_signature_changed_names_the_parameters(host):
    status = check_point(point("a_host:Engine.forward", ["hidden", "kv", "layer"]))
    assert status.state == "FAILED"
    assert status.detail == "its signature no longer takes kv, layer"


def test_a_point_may_be_a_dataclass_that_is_made(host):
    assert check_point(point("a_host:Batch", ["tokens", "lengths"])).state == "ok"
    assert check_point(point("a_host:Batch", ["tokens", "pages"])).state == "FAILED"


def test_a_point_may_be_a_property_that_is_read(host):
    assert check_point(point("a_host:Engine.used")).state == "ok"
    del host.Engine.used
    assert check_point(point("a_host:Engine.used")).state == "FAILED"


@pytest.mark.parametrize("target", ["a_host:VERSION", "a_host:Engine.limit"])
def test_a_point_that_is_no_callable_any_more_fails_and_does_not_raise(host, target):
    assert check_point(point(target)).state == "FAILED"


@pytest.mark.parametrize("error", ["OSError('no libcudart')", "RuntimeError('no GPU')"])
def test_a_host_that_does_not_import_fails_and_does_not_raise(tmp_path, monkeypatch, error):
    (tmp_path / "a_broken_host.py").write_text(f"raise {error}\n")
    monkeypatch.syspath_prepend(tmp_path)
    status = check_point(point("a_broken_host:run"))
    assert status.state == "FAILED"
    assert "no " in status.detail


READ = ("declared", "given_by_a_method", "given_in_a_context", "limit", "used", "forward")


@pytest.mark.parametrize("name", READ)
def test_attributes_are_found_however_a_class_gives_them(host, name):
    status = check_point(point("a_host:Engine", reads=[name]))
    assert str(status) == f"ok: reads the layer ({name})"


def test_attributes_of_a_base_are_attributes(host, monkeypatch):
    monkeypatch.setattr(host, "Engine", type("Engine", (host.Engine,), {}))
    assert check_point(point("a_host:Engine", reads=READ)).state == "ok"


def test_attributes_that_nothing_gives_are_named(host):
    names = ["declared", "only_read_too", "limit", "nowhere"]
    status = check_point(point("a_host:Engine", reads=names))
    assert str(status) == "FAILED: it has no only_read_too, nowhere any more"


def test_checking_changes_nothing(host):
    before = dict(vars(host)), dict(vars(host.Engine))
    check_point(point("a_host:Engine.forward", ["hidden"]))
    check_point(point("a_host:Engine", reads=READ))
    list(check_extension(extension(Ours)))
    assert (dict(vars(host)), dict(vars(host.Engine))) == before


# A class of ours that extends one of the host's.


class Ours:
    """Redefines three names of two classes, and has two new ones."""

    limit = 4
    keep = None

    def forward(self, hidden, *args, mask=None, **kwargs):
        """Drops tokens.

        And more.
        """

    def replay(self, batch):
        """Replays what was kept."""

    @property
    def used(self):
        """What is kept."""

    def drop(self, tokens):
        """New."""


def extension(ours, new=("drop", "keep")):
    module = sys.modules.setdefault("ours", types.ModuleType("ours"))
    module.Ours = ours
    return Extension("ours:Ours", ("a_host:Engine", "a_host:Wider"), new)


def failed(found):
    return {one.target: one.detail for one in check_extension(found) if one.state == "FAILED"}


def test_what_is_redefined_is_read_off_the_class_with_its_first_line(host):
    assert {one.target: str(one) for one in check_extension(extension(Ours))} == {
        "a_host:Engine.limit": "ok: a setting",
        "a_host:Engine.keep": "ok: new in Ours; the host has none",
        "a_host:Engine.forward": "ok: Drops tokens.",
        "a_host:Wider.replay": "ok: Replays what was kept.",
        "a_host:Engine.used": "ok: What is kept.",
        "a_host:Engine.drop": "ok: new in Ours; the host has none",
    }


def test_every_redefinition_that_the_host_renames_is_found(host):
    found = extension(Ours)
    names = list(redefined(found))
    assert {name for _, name in names} == {"limit", "forward", "replay", "used"}
    for base, name in names:
        with renamed(base, name):
            (detail,) = failed(found).values()
        assert detail.startswith("not found; Ours redefines it: "), name
    assert not failed(found)


def test_what_a_base_of_the_hosts_class_has_is_there(host, monkeypatch):
    monkeypatch.setattr(host, "Engine", type("Engine", (host.Engine,), {}))
    assert not failed(extension(Ours))


@pytest.mark.parametrize(
    ("base", "name", "changed", "gone"),
    [
        ("Wider", "replay", lambda self, other: None, "batch"),
        ("Engine", "forward", lambda self, hidden: None, "mask"),
    ],
)
def test_a_parameter_that_the_host_dropped_is_found(host, monkeypatch, base, name, changed, gone):
    monkeypatch.setattr(getattr(host, base), name, changed)
    assert failed(extension(Ours)) == {
        f"a_host:{base}.{name}": f"its signature no longer takes {gone}",
    }


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("forward", 3, "it is no callable any more"),
        ("forward", property(lambda self: 1), "it is no property any more, or has become one"),
        ("used", lambda self: 1, "it is no property any more, or has become one"),
        ("limit", property(lambda self: 1), "it is no property any more, or has become one"),
    ],
)
def test_a_redefinition_of_another_kind_is_found(host, monkeypatch, name, value, says):
    monkeypatch.setattr(host.Engine, name, value)
    assert failed(extension(Ours)) == {f"a_host:Engine.{name}": says}


@pytest.mark.parametrize("base", ["Engine", "Wider"])
@pytest.mark.parametrize("how", ["method", "given by a method", "declared"])
def test_a_new_name_that_the_host_has_as_well_is_found(host, monkeypatch, base, how):
    def reset(self):
        self.drop = None

    changed = getattr(host, base)
    if how == "method":
        monkeypatch.setattr(changed, "drop", lambda self: None, raising=False)
    elif how == "given by a method":
        monkeypatch.setattr(changed, "reset", reset, raising=False)
    else:
        monkeypatch.setattr(changed, "__annotations__", {"drop": int}, raising=False)
    assert failed(extension(Ours)) == {f"a_host:{base}.drop": "Ours has another of the same name"}


def test_a_name_of_ours_that_nothing_declares_new_is_found(host):
    assert failed(extension(Ours, new=("keep",))) == {
        "a_host:Engine.drop": "not found; Ours redefines it: New."
    }


def test_a_class_that_became_a_function_is_found(host, monkeypatch):
    monkeypatch.setattr(host, "Wider", lambda: None)
    assert failed(extension(Ours)).keys() == {"a_host:Engine.replay"}
    assert check_point(point("a_host:Wider", reads=["replay"])).state == "FAILED"


def test_a_class_that_is_gone_is_one_failure_and_no_traceback(host):
    del host.Wider
    ((target, detail),) = failed(extension(Ours)).items()
    assert target == "ours:Ours"
    assert "Wider" in detail


# A ledger as a whole.


@pytest.fixture
def fitting(host):
    """A ledger that the host fits."""
    points = {
        "wrapped": (point("a_host:Engine.forward", ["hidden"]),),
        "later": (point("a_host:Engine", reads=["declared"]), point("a_host:prefill")),
    }
    return Ledger("A Host", "a-host", ("1.2", "1.4"), points, (extension(Ours),), "ours")


def test_groups_are_checked_at_their_times(fitting):
    def checked(*groups):
        return [status.target for status in fitting.check(*groups)]

    assert checked("wrapped") == ["a_host:Engine.forward"]
    assert checked("later") == ["a_host:Engine", "a_host:prefill"]
    assert len(checked("extended")) == 6
    assert checked() == checked("wrapped", "later", "extended")


def test_a_group_that_is_not_there_is_no_empty_check(fitting):
    with pytest.raises(KeyError, match="laetr"):
        fitting.check("laetr")


def test_every_change_of_a_host_is_found(fitting):
    planned = [parameters.values for parameters in changes(fitting)]
    assert [change for _, change in planned] == ["gone", "takes less", "gone", "has less", "gone"]
    for changed, change in planned:
        with planted(changed, change):
            assert check_point(changed).state == "FAILED", (changed.target, change)
        assert check_point(changed).state == "ok"


def test_the_first_failure_is_what_a_start_is_refused_with(fitting, monkeypatch):
    monkeypatch.setattr(ledger, "version", lambda package: f"9 of {package}")
    fitting.require(fitting.check())
    statuses = [
        PointStatus("a:b", "ok", "fits"),
        PointStatus("a:c", "FAILED", "not found"),
        PointStatus("a:d", "FAILED", "not found either"),
    ]
    with pytest.raises(UnsupportedError) as refused:
        fitting.require(statuses)
    assert str(refused.value) == (
        "this A Host (9 of a-host, tested is 1.2 to 1.4) does not fit: a:c: not found; "
        "run entropyprune doctor"
    )


@pytest.mark.parametrize(
    ("tested", "installed", "warned"),
    [
        (["1.2", "1.3", "1.10"], "1.2.0", False),
        (["1.2", "1.3", "1.10"], "1.10.9", False),
        (["1.2", "1.3", "1.10"], "1.9", False),
        (["1.2", "1.3", "1.10"], "1.1.9", True),
        (["1.2", "1.3", "1.10"], "1.11.0.dev0", True),
        (["1.2", "1.3", "1.10"], "2.0", True),
        (["0.5.23"], "0.5.23", False),
        (["0.5.23"], "0.5.23.post1", False),
        (["0.5.23"], "0.5.22", True),
        (["0.5.23"], "0.5.24", True),
    ],
)
def test_a_version_that_was_never_tested_is_said_once(
    monkeypatch, caplog, tested, installed, warned
):
    monkeypatch.setattr(ledger, "version", lambda package: installed)
    ledger._warn_once.cache_clear()
    for _ in range(2):
        Ledger("A Host", "a-host", tuple(tested), {}, (), "ours").warn_if_untested()
    ledger._warn_once.cache_clear()
    span = "0.5.23" if tested == ["0.5.23"] else "1.2 to 1.10"
    said = f"never tested with A Host {installed}, tested is {span}; "
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * warned
    assert all(said in record.getMessage() for record in caplog.records)


def test_the_example_in_the_words_of_the_module_can_be_read(backend):
    lines = ledger.__doc__.splitlines()
    example = [line for line in lines if line.startswith("    ")]
    (backend / "ledger.toml").write_text("\n".join(example))
    read = Ledger.read("a_backend")
    assert read["transformers.masking_utils:create_causal_mask"].takes == ("config", "layer_idx")
    assert read.extensions[0].bases == ("transformers.cache_utils:DynamicLayer",)


def test_every_engine_has_its_ledger():
    folder = Path(ledger.__file__).parents[1] / "backends" / "ep_backends"
    found = sorted(file.parent.name for file in folder.glob("*/ledger.toml"))
    assert found == ["lmdeploy", "sglang", "transformers"]
    for name in found:
        read = Ledger.read(f"ep_backends.{name}")
        assert read.package == name
        for one in read.all_points():
            assert one.why, f"{one.target}: nothing says what it is for"
            assert bool(one.by) == (one in read.points.get("wrapped", ())), one.target
            assert one.until or not one.by, f"{one.target}: nothing says until when"
