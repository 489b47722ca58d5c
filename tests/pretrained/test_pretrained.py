"""The training of benchmarks/pretrained, with the demonstration model for the pretrained one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("skimage", reason="drawing has requirements of its own: make test-pretrained")

from transformers import Qwen2_5_VLForConditionalGeneration

from benchmarks.embedded_model.scenes import TASKS
from benchmarks.embedded_model.tokenizer import PROMPT_END, build_tokenizer
from benchmarks.pretrained import train
from benchmarks.pretrained.lessons import exam, lesson, studio
from benchmarks.pretrained.model import Student, add_updates, merge_updates
from benchmarks.pretrained.packing import collate, picture_prefix
from ep_core import demo


def load(attention: str) -> Any:
    """The demonstration model in float32; "masked" is the attention that training uses."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(
        demo.MODEL,
        dtype=torch.float32,
        attn_implementation={"text_config": attention, "vision_config": "sdpa"},
    ).eval()


def test_a_seed_gives_the_same_lesson_again_and_another_step_another_one():
    first, again, other = (lesson((0, 1, step), "ask", 1)[0] for step in (5, 5, 6))
    assert np.array_equal(first.picture.pixels, again.picture.pixels)
    assert first.questions == again.questions
    assert first.picture.pixels.shape != other.picture.pixels.shape or not np.array_equal(
        first.picture.pixels, other.picture.pixels
    )


@pytest.mark.parametrize("grid", [(8, 8), (12, 12), (12, 16)])
def test_every_thing_of_a_cluttered_picture_lies_on_a_token(grid):
    for seed in range(20):
        picture = studio("cluttered", "test").picture(np.random.default_rng(seed), grid)
        assert picture.grid == grid
        owned = set(picture.owner.ravel()) - {-1}
        assert owned == set(range(len(picture.things))), f"seed {seed}"
        for thing in picture.things:
            top, left, bottom, right = thing.box
            assert 0 <= top < bottom <= grid[0], f"seed {seed}: {thing}"
            assert 0 <= left < right <= grid[1], f"seed {seed}: {thing}"


def test_an_exam_asks_every_task_that_a_picture_allows():
    asked = [question.task for prompt in exam("cluttered", 0, 8) for question in prompt.questions]
    assert set(asked) == set(TASKS)


@torch.no_grad()
def test_a_packed_question_is_answered_as_it_is_alone():
    prompts, tokenizer = exam("plain", 0, 2, (8, 10)), build_tokenizer()
    student, alone = Student(load("masked")), load("sdpa")
    batch = collate(prompts, tokenizer)
    packed = student.answer(batch, student.see(batch))
    expected = []
    for prompt, patches, grid in zip(prompts, batch.patches.chunk(2), batch.grids, strict=True):
        for question in prompt.questions:
            prefix, _ = picture_prefix(prompt.picture.grid, tokenizer)
            asked = tokenizer.encode(question.text + PROMPT_END).ids
            answer = tokenizer.encode(question.answer + "<|im_end|>").ids
            ids = torch.tensor([prefix + asked + answer])
            scores = alone(
                input_ids=ids,
                mm_token_type_ids=ids.eq(alone.config.image_token_id).int(),
                pixel_values=patches,
                image_grid_thw=grid[None],
            ).logits[0]
            expected.append(scores[-len(answer) - 1 : -1])
    torch.testing.assert_close(packed, torch.cat(expected), atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_merged_updates_give_the_same_answers():
    batch = collate(exam("plain", 0, 1, (8, 8)), build_tokenizer())
    student = Student(load("masked"))
    before = student.answer(batch, student.see(batch))
    add_updates(student.model)
    torch.testing.assert_close(student.answer(batch, student.see(batch)), before)
    for name, parameter in student.named_parameters():
        if name.endswith(".up"):
            parameter.normal_(std=0.02)
    updated = student.answer(batch, student.see(batch))
    merge_updates(student.model)
    merged = student.answer(batch, student.see(batch))
    assert (updated - before).abs().max() > 0.1, "these updates change nothing: the test is empty"
    torch.testing.assert_close(merged, updated, atol=1e-3, rtol=1e-3)


def test_a_stopped_stage_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch):
    stage = train.Stage("tuned", 4, 1.0, 1, 1, 0.3, 0.0, 1e-3, 1e-3)
    monkeypatch.setattr(train, "STAGES", (stage,))
    monkeypatch.setattr(train, "CHECKPOINT", 2)
    monkeypatch.setattr(train, "examine", lambda *_: {})
    monkeypatch.setattr(train, "export", lambda *_: None)

    def training(folder: str) -> train.Training:
        torch.manual_seed(0)
        student = Student(load("masked"))
        student.model.requires_grad_(False)
        add_updates(student.model)
        (tmp_path / folder).mkdir(exist_ok=True)
        return train.Training(tmp_path / folder, 0, student, build_tokenizer())

    straight = training("straight")
    straight.run(1.0, seed=0)

    stopped = training("stopped")
    learn = stopped.learn

    def stop_at_the_fourth(seed: int, progress: float) -> dict[str, float]:
        if stopped.step == 3:
            raise KeyboardInterrupt
        return learn(seed, progress)

    monkeypatch.setattr(stopped, "learn", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(1.0, seed=0)
    resumed = training("stopped")
    assert resumed.step == 2
    resumed.run(1.0, seed=0)
    for name, tensor in straight.student.trained().items():
        torch.testing.assert_close(resumed.student.trained()[name], tensor, msg=name)
