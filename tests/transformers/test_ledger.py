"""Whatever of transformers' is overridden, called or read is in the ledger."""

import pytest

from ep_backends import transformers as package
from ep_backends.transformers import enable
from ep_backends.transformers.backend import TransformersBackend
from ep_backends.transformers.ledger import LEDGER
from ep_core import ledger
from ep_core.ledger import check_extension, check_point

from ..ledgers import changes, extending, planted, redefined, renamed  # noqa: TID252 # no package


def test_everything_fits_the_installed_version():
    for status in TransformersBackend().probe():
        assert status.state == "ok", f"{status.target}: {status.detail}"
        assert status.detail, f"{status.target}: nothing says what it is for"


@pytest.mark.parametrize(("point", "change"), changes(LEDGER))
def test_a_change_of_transformers_is_noticed(point, change):
    with planted(point, change):
        assert check_point(point).state == "FAILED"


def test_every_class_that_extends_one_of_transformers_is_in_the_ledger():
    extended = {extension.ours for extension in LEDGER.extensions}
    assert extending(package, "transformers") == extended


@pytest.mark.parametrize("extension", LEDGER.extensions, ids=lambda extension: extension.ours)
def test_every_redefinition_that_transformers_renames_is_noticed(extension):
    names = list(redefined(extension))
    assert {"update", "crop", "reorder_cache"} <= {name for _, name in names}
    for base, name in names:
        with renamed(base, name):
            failed = [one for one in check_extension(extension) if one.state == "FAILED"]
        assert [one.target.rpartition(".")[2] for one in failed] == [name]


@pytest.mark.parametrize(
    ("installed", "warned"),
    [("5.16.9", True), ("5.17.0", False), ("5.23.4", False), ("5.24.0.dev0", True)],
)
def test_a_version_that_was_never_tested_is_named_once(lab, monkeypatch, caplog, installed, warned):
    model = lab("qwen-gqa").model()
    monkeypatch.setattr(ledger, "version", lambda package: installed)
    ledger._warn_once.cache_clear()
    for _ in range(2):
        enable(model, "layer=2,keep=0.3").disable()
    ledger._warn_once.cache_clear()
    told = [record.getMessage() for record in caplog.records if "never tested" in record.message]
    assert len(told) == int(warned)
    assert all(f"transformers {installed}" in line and "5.17 to 5.23" in line for line in told)
