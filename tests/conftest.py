"""Checkpoints and pictures that several test folders use."""

from pathlib import Path

import pytest
import torch

from ep_conformance.plugin import Workshop

# tiny tensors: waiting for a second thread at every operation costs more than it gives
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="session")
def llava_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sizes of LLaVA-1.5-7B and no weights."""
    folder = tmp_path_factory.mktemp("llava-7b")
    (folder / "config.json").write_text(
        """{"model_type": "llava", "image_token_id": 32000,
        "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
        "text_config": {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096,
          "intermediate_size": 11008, "num_attention_heads": 32}}"""
    )
    return folder
