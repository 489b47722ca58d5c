"""The command line as a user runs it: its output, its files, its one-line errors."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from PIL import Image

from entropyprune.cli import common, doctor, main
from ep_backends.transformers.backend import TransformersBackend
from ep_core import demo
from ep_core.backend import BackendSpec
from ep_core.ecl import EntropyProfile
from ep_core.errors import EntropyPruneError
from ep_core.plugins import registry

PICTURE = demo.PICTURES / "sample_00.png"
SECOND = demo.PICTURES / "sample_01.png"
QUESTION = "what number is written?"


@pytest.fixture
def entropyprune(monkeypatch, capsys):
    """Run the command in this process: (exit status, stdout, stderr)."""
    monkeypatch.delenv("ENTROPYPRUNE", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["entropyprune", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main.main()
        out, err = capsys.readouterr()
        return exit_.value.code, out, err

    return run


def run_demo(*more: object) -> list[object]:
    return ["run", "--model", demo.MODEL, "--image", PICTURE, "--prompt", QUESTION, *more]


def test_run_prints_the_answer(entropyprune):
    status, out, _ = entropyprune(*run_demo("--policy", "layer=2,keep=0.5,method=set-entropy"))
    (answer,) = [
        q["answer"]
        for picture in json.loads((demo.PICTURES / "samples.json").read_text())
        if picture["image"] == PICTURE.name
        for q in picture["questions"]
        if q["question"] == QUESTION
    ]
    assert (status, out.strip()) == (0, answer)


def test_json_is_alone_on_stdout_and_complete(entropyprune):
    status, out, _ = entropyprune(
        *run_demo("--image", SECOND, "--policy", "layer=2,keep=36", "--max-new-tokens", 4, "--json")
    )
    assert status == 0
    result = json.loads(out)
    assert list(result) == [
        "backend",
        "model",
        "policy",
        "spans",
        "output_ids",
        "text",
        "kv",
        "reason",
    ]
    assert result["backend"] == "transformers"
    assert result["policy"] == "layer=2,keep=36,method=released"
    assert result["reason"] is None
    first, second = result["spans"]
    for span in (first, second):
        assert span["stop"] - span["start"] == 144
        assert span["kept"] == sorted(set(span["kept"]))
        assert len(span["kept"]) == 36
        assert 0 <= span["kept"][0] <= span["kept"][-1] < 144
    assert first["stop"] <= second["start"], "pictures come in the order given"
    assert result["kv"]["below"] - result["kv"]["from"] == 2 * (144 - 36)
    assert len(result["output_ids"]) <= 4


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ([], "no policy is set"),
        (["--policy", "layer=2,keep=1.0"], "the budget keeps every token"),
    ],
)
def test_json_says_why_nothing_was_pruned(entropyprune, more, reason):
    status, out, _ = entropyprune(*run_demo("--json", "--max-new-tokens", 2, *more))
    result = json.loads(out)
    assert (status, result["reason"]) == (0, reason)
    assert result["kv"]["below"] == result["kv"]["from"]


def test_text_alone_says_why_nothing_was_pruned(entropyprune):
    status, out, _ = entropyprune(
        "run", "--model", demo.MODEL, "--prompt", "hello", "--policy", "layer=2,keep=9", "--json"
    )
    result = json.loads(out)
    assert (status, result["spans"]) == (0, [])
    assert result["reason"] == "the prompt has no visual tokens"


def test_the_environment_sets_the_policy(entropyprune, monkeypatch):
    monkeypatch.setenv("ENTROPYPRUNE", "layer=3,keep=12")
    status, out, _ = entropyprune(*run_demo("--json", "--max-new-tokens", 2))
    assert status == 0
    assert json.loads(out)["policy"] == "layer=3,keep=12,method=released"


def test_layer_auto_is_settled_by_the_adapter(entropyprune):
    _, out, _ = entropyprune(
        *run_demo("--policy", "layer=auto,keep=12", "--json", "--max-new-tokens", 2)
    )
    assert json.loads(out)["policy"] == "layer=1,keep=12,method=released"


@pytest.mark.parametrize(
    ("there", "given", "device"),
    [(True, [], "cuda"), (False, [], "cpu"), (True, ["--device", "cpu"], "cpu")],
)
def test_the_device_is_cuda_where_there_is_one(entropyprune, monkeypatch, there, given, device):
    def refuse(*_, device, **__):
        raise EntropyPruneError(f"opened on {device}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(TransformersBackend, "open", refuse)
    status, _, err = entropyprune(*run_demo(*given))
    assert (status, err) == (2, f"entropyprune: error: opened on {device}\n")


def test_help_says_which_device_is_the_default(entropyprune):
    status, out, _ = entropyprune("run", "--help")
    assert status == 0
    assert "cuda where there is one, else cpu" in " ".join(out.split())


def test_compare_shows_both_sides(entropyprune):
    status, out, _ = entropyprune(*run_demo("--policy", "layer=2,keep=36", "--compare"))
    assert status == 0
    for words in ("unpruned", "pruned", "answer", "GFLOPs", "KV slots", "seconds", "75.0%"):
        assert words in out, f"{words!r} is missing in:\n{out}"


def answering(monkeypatch, text):
    """Let every answer say this, whatever the model said."""
    open_ = TransformersBackend.open

    def opened(*arguments, **options):
        session = open_(*arguments, **options)
        generate = session.generate
        session.generate = lambda asked: [replace(each, text=text) for each in generate(asked)]
        return session

    monkeypatch.setattr(TransformersBackend, "open", opened)


def test_an_answer_is_printed_as_the_model_gave_it(entropyprune, monkeypatch):
    text = "[red]3[/red] [/b] :cat: " + "word " * 40
    answering(monkeypatch, text)
    status, out, _ = entropyprune(*run_demo("--policy", "layer=2,keep=36"))
    assert (status, out) == (0, f"{text}\n"), "no markup, no emoji, no line breaks of ours"


def test_compared_answers_are_printed_as_the_model_gave_them(entropyprune, monkeypatch):
    answering(monkeypatch, "[red]3[/] [/b] :cat:")
    status, out, _ = entropyprune(*run_demo("--policy", "layer=2,keep=36", "--compare"))
    assert (status, out.count("[red]3[/] [/b] :cat:")) == (0, 2), out


def test_compare_json_holds_both_answers(entropyprune):
    status, out, _ = entropyprune(
        *run_demo("--policy", "layer=2,keep=36", "--compare", "--json", "--max-new-tokens", 2)
    )
    result = json.loads(out)
    assert status == 0
    assert result["unpruned"]["reason"] == "no policy is set"
    assert set(result["seconds"]) == {"pruned", "unpruned"}


def test_overlay_draws_every_picture(entropyprune, tmp_path):
    out_file = tmp_path / "overlay.png"
    status, out, _ = entropyprune(
        *run_demo("--image", SECOND, "--policy", "layer=2,keep=36", "--overlay", out_file)
    )
    assert status == 0
    assert str(out_file) in out.replace("\n", "")
    with Image.open(out_file) as sheet:
        assert sheet.width == 2 * 672, "two square pictures side by side"


def test_calibrate_writes_profile_and_plot(entropyprune, tmp_path):
    profile, plot = tmp_path / "profile.json", tmp_path / "profile.png"
    status, out, err = entropyprune(
        *["calibrate", "--model", demo.MODEL, "--image", PICTURE, "--image", SECOND],
        *["--layer", 3, "--out", profile, "--plot", plot],
    )
    assert status == 0
    assert "no collapse layer: layer=3 stands" in out
    assert "2 samples are too few" in out
    assert "measuring" in err, "long work shows progress on stderr"
    read = EntropyProfile.from_json(profile.read_text())
    assert [len(sample) for sample in read.entropies] == [8, 8]
    with Image.open(plot) as drawn:
        assert len(drawn.convert("RGB").getcolors(1 << 24)) > 10, "the plot is blank"


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(
    entropyprune, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "entropyprune.cli.plot", raising=False)
    status, out, err = entropyprune(
        "calibrate", "--model", demo.MODEL, "--image", PICTURE, "--plot", tmp_path / "plot.png"
    )
    expected = "--plot needs matplotlib; run pip install 'entropyprune[plot]'"
    assert (status, out, err) == (2, "", f"entropyprune: error: {expected}\n")


def test_show_states_the_budget_in_all_three_meanings(entropyprune, llava_7b):
    """The paper's headline: average 128 of 576 visual tokens with 86 text tokens saves 68.2 %."""
    status, out, _ = entropyprune(
        *["show", "--model", llava_7b, "--policy", "layer=2,average=128", "--text-tokens", 86]
    )
    assert status == 0
    assert "98 (17.0%)" in out
    assert "127.9 (22.2%)" in out
    assert "68.2%" in out


def test_doctor_checks_every_attach_point(entropyprune):
    status, out, _ = entropyprune("doctor")
    assert status == 0, out
    assert out.count("ok: ") >= 6
    assert "FAILED" not in out
    assert "backend transformers: transformers " in out


def registry_with(monkeypatch, **errors):
    """Let the backends of these names fail to load; all but our engines are another plugin's."""

    def failing(error):
        def load():
            raise error

        return load

    real = registry()
    backends = {name: BackendSpec(name, "", failing(error)) for name, error in errors.items()}
    theirs = {f"backend {name}": "theirs" for name in errors.keys() - real.backends.keys()}
    changed = replace(
        real, backends={**real.backends, **backends}, providers={**real.providers, **theirs}
    )
    for module in (doctor, common):
        monkeypatch.setattr(module, "registry", lambda: changed)


def test_doctor_ends_with_the_engines_that_cannot_be_loaded(entropyprune, monkeypatch):
    broken = ImportError("libx.so: no such file")
    other = ModuleNotFoundError("No module named 'x'", name="x")
    registry_with(monkeypatch, lmdeploy=broken, sglang=PackageNotFoundError("sglang"), own=other)
    status, out, _ = entropyprune("doctor")
    engines = [line for line in out.splitlines() if line.startswith("backend ")]
    assert status == 0
    assert engines[0].startswith("backend transformers: transformers ")
    assert engines[1:] == [
        "backend lmdeploy cannot be loaded (libx.so: no such file)",
        "backend own cannot be loaded (No module named 'x')",
        "backend sglang is not installed",
    ]


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        (
            "sglang",
            PackageNotFoundError("sglang"),
            "is not installed; run pip install 'entropyprune[sglang]'",
        ),
        (
            "sglang",
            ImportError("libx.so: no such file"),
            "cannot be loaded (libx.so: no such file); run pip install 'entropyprune[sglang]'",
        ),
        ("own", ModuleNotFoundError("No module named 'own'", name="own"), "is not installed"),
    ],
    ids=["missing", "broken", "another plugin's"],
)
def test_an_engine_that_cannot_be_loaded_is_one_line(entropyprune, monkeypatch, name, error, says):
    registry_with(monkeypatch, **{name: error})
    status, out, err = entropyprune(*run_demo("--backend", name))
    assert (status, out, err) == (2, "", f"entropyprune: error: backend {name!r} {says}\n")


def test_doctor_fails_on_a_bad_policy(entropyprune, monkeypatch):
    monkeypatch.setenv("ENTROPYPRUNE", "layer=2")
    status, out, _ = entropyprune("doctor")
    assert status == 1
    assert "FAILED: the policy needs one budget" in out


def test_list_names_everything_with_its_plugin(entropyprune):
    status, out, _ = entropyprune("list")
    assert status == 0
    for name in ("transformers", "llava", "qwen2_5_vl", "released", "set-entropy", "selectors"):
        assert name in out
    assert str(demo.MODEL) in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["transformers"], ["no policy", "ENTROPYPRUNE"]),
        (["transformers", "--policy", "layer=2,keep=9"], ["this engine has no server"]),
        (["nothing", "--policy", "layer=2,keep=9"], ["'nothing'", "sglang, transformers"]),
        (["sglang", "--policy", "layer=2"], ["needs one budget"]),
        (["sglang", "--policy", "layer=2,keep=9"], ["'entropyprune[sglang]'"]),  # not in this venv
    ],
)
def test_serve_says_why_it_cannot(entropyprune, arguments, words):
    status, _, err = entropyprune("serve", *arguments, "--", "--port", 1)
    assert status == 2
    (line,) = err.strip().splitlines()
    for word in words:
        assert word in line


def checkpoint_with(tmp_path: Path, config: str) -> Path:
    (tmp_path / "config.json").write_text(config)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "absent.png"], ["absent.png", "does not exist"]),
        (["--image", __file__], ["test_cli.py", "is not a readable picture"]),
        (["--policy", "layer=2,keep=0"], ["keep=0", "keep=128"]),
        (["--policy", "layer=2,keep=1.5"], ["keep=1.5", "(0, 1]"]),
        (["--policy", "layer=2,keep=999"], ["keep=999", "keep=144 or less"]),
        (["--policy", "layer=8,keep=9"], ["layer=8", "1 to 7"]),
        (["--policy", "layer=0,keep=9"], ["layer=0", "layer=2"]),
        (["--policy", "layer=2"], ["budget", "layer=2,keep=128"]),
        (["--policy", "layer=2,keep=9,depth=3"], ["'depth'", "layer, keep"]),
        (["--policy", "layer=2,keep=9,method=magic"], ["'magic'", "set-entropy"]),
        (["--policy", "nonsense"], ["'nonsense'", "layer=2,keep=128"]),
        (["--policy", "layer=4,average=0.4"], ["average=0.4", "average=0.50"]),
        (["--policy", "layer=2,flops=0.99"], ["flops=0.99", "or less"]),
        (["--backend", "nowhere"], ["'nowhere'", "transformers"]),
        (["--max-new-tokens", 0], ["max-new-tokens"]),
        (["--device", "tpu"], ["tpu", "cpu"]),
        (["--compare"], ["--compare needs a policy"]),
        (["--overlay", "absent/overlay.png"], ["absent", "no such folder"]),
        (["--overlay", "overlay.foo"], ["overlay.foo", ".png"]),
        (["--image", "{truncated}"], ["not a readable picture", "truncated"]),
        (["--image", "{narrow}"], ["cannot be encoded", "aspect ratio"]),
        (["--prompt", "<|image_pad|>"], ["the text contains <|image_pad|>", "leave it out"]),
        (["--prompt", "\udcff"], ["cannot be encoded"]),
    ],
    ids=lambda value: " ".join(map(str, value)).replace(str(Path(__file__).parent), "."),
)
def test_bad_input_is_one_line_and_exit_2(entropyprune, arguments, words, tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((64, 64), 50).save(whole)
    (tmp_path / "truncated.jpg").write_bytes(whole.read_bytes()[:-500])
    Image.new("RGB", (1, 400)).save(tmp_path / "narrow.png")
    places = {"{truncated}": tmp_path / "truncated.jpg", "{narrow}": tmp_path / "narrow.png"}
    arguments = [places.get(argument, argument) for argument in arguments]
    status, out, err = entropyprune(*run_demo(*arguments))
    lines = [line for line in err.splitlines() if line and "Loading weights" not in line]
    assert (status, out) == (2, "")
    assert len(lines) == 1, f"one line was asked for, got:\n{err}"
    assert lines[0].startswith("entropyprune: error: ")
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"model_type": "gpt2"}', ["'gpt2'", "internvl, llava, qwen2_5_vl, qwen2_vl"]),
        ("{}", ["model_type"]),
        ("{", ["no valid JSON"]),
        (None, ["no config.json"]),
    ],
    ids=["unknown type", "no type", "broken", "absent"],
)
def test_unusable_checkpoints_are_one_line(entropyprune, tmp_path, config, words):
    if config is not None:
        checkpoint_with(tmp_path, config)
    status, out, err = entropyprune("run", "--model", tmp_path, "--prompt", "hello")
    assert (status, out, err.count("\n")) == (2, "", 1), err
    for word in words:
        assert word in err


@pytest.mark.parametrize("damage", ["no weights", "half the weights", "half the tokenizer"])
def test_a_damaged_checkpoint_is_one_line(entropyprune, tmp_path, damage):
    shutil.copytree(demo.MODEL, tmp_path / "model")
    weights, tokenizer = tmp_path / "model/model.safetensors", tmp_path / "model/tokenizer.json"
    if damage == "no weights":
        weights.unlink()
    elif damage == "half the weights":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    else:
        tokenizer.write_text(tokenizer.read_text()[:1000])
    status, out, err = entropyprune("run", "--model", tmp_path / "model", "--prompt", "hello")
    lines = [line for line in err.splitlines() if line and "Loading weights" not in line]
    assert (status, out, len(lines)) == (2, "", 1), err
    assert "cannot be loaded" in err


def test_output_that_cannot_be_written_is_one_line():
    command = [sys.executable, "-m", "entropyprune", "list"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr


def test_calibrate_refuses_a_layer_out_of_range(entropyprune):
    status, _, err = entropyprune(
        "calibrate", "--model", demo.MODEL, "--image", PICTURE, "--layer", 99
    )
    assert status == 2
    assert "--layer 99" in err
    assert "1 to 7" in err


def test_the_installed_command_prints_one_line_errors():
    command = Path(sys.executable).with_name("entropyprune")
    result = subprocess.run(
        [command, *map(str, run_demo("--policy", "layer=2,keep=999"))],
        capture_output=True,
        text=True,
        env=os.environ | {"ENTROPYPRUNE": ""},
        check=False,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("entropyprune: error: keep=999"), "no progress bar in a pipe"
    assert result.stderr.count("\n") == 1
