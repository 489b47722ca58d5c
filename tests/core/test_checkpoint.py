"""Reading config.json: what it holds, or one line about what is wrong."""

import json

import pytest

from ep_core.checkpoint import read_config
from ep_core.errors import EntropyPruneError


def test_the_config_is_read_as_it_stands(tmp_path):
    config = {"model_type": "llava", "note": "größe", "text_config": {"hidden_size": 4}}
    text = json.dumps(config, ensure_ascii=False)
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert read_config(tmp_path) == config


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(parents=True)])
def test_a_folder_without_config_is_no_checkpoint(tmp_path, make):
    folder = tmp_path / "model"
    make(folder)
    with pytest.raises(EntropyPruneError, match=r"no config\.json") as caught:
        read_config(folder)
    assert str(folder) in str(caught.value)


def test_a_file_is_no_checkpoint_folder(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(EntropyPruneError, match=r"no config\.json"):
        read_config(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no valid JSON"),
        (b"{", "no valid JSON"),
        (b'{\n"model_type": "llava",\n}', "no valid JSON"),
        (b"\xff\xfe{}", "no valid JSON"),
        (b"[]", "names no model_type"),
        (b"3", "names no model_type"),
        (b"{}", "names no model_type"),
        (b'{"model_type": null}', "names no model_type"),
        (b'{"model_type": ["llava"]}', "names no model_type"),
    ],
)
def test_a_config_that_cannot_be_used_is_one_line_with_the_file(tmp_path, content, says):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(EntropyPruneError, match=says) as caught:
        read_config(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
