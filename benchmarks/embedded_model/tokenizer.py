"""The tokenizer and the chat template.

Byte-level BPE in which every word of the tasks is one token, every digit is its own token, and the
special tokens are those of Qwen.
"""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.embedded_model.scenes import COLORS, CORNERS, RELATIONS, SHAPES

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, VISION_PAD = "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
SPECIALS = [
    END_OF_TEXT,
    IM_START,
    IM_END,
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>"),
    *(VISION_START, VISION_END, VISION_PAD, IMAGE_PAD, VIDEO_PAD),
]
VOCABULARY = 448  # what the embedding holds: the 435 tokens, padded to a round number

# Training packs many questions behind one picture; these two pieces make every one of them read
# exactly as the chat template would have put it.
PROMPT_START = f"{IM_START}user\n"
PROMPT_END = f"{IM_END}\n{IM_START}assistant\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def visual_span(tokens: int) -> str:
    """What one picture of so many visual tokens looks like in a prompt."""
    return VISION_START + IMAGE_PAD * tokens + VISION_END


@cache
def build_tokenizer() -> Tokenizer:
    """Train the tokenizer; it takes milliseconds and always gives the same one."""
    split_digits = pre_tokenizers.Digits(individual_digits=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split_digits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIALS),
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus() * 2, trainer)
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def token_id(token: str) -> int:
    """The id of a token that is known to exist."""
    found = build_tokenizer().token_to_id(token)
    assert found is not None, token
    return found


def _corpus() -> list[str]:
    """Every word in every form in which the questions and answers use it."""
    questions = [
        "what number is written?",
        "which digit is handwritten?",
        *(f"what color is the {shape}?" for shape in SHAPES),
        *(f"how many {plural}?" for plural in SHAPES.values()),
        *(f"what shape is {color}?" for color in COLORS),
        *(f"is there a {color} star?" for color in COLORS),
        *(f"is the red star {relation} the blue star?" for relation in RELATIONS),
        "where is the red star?",
    ]
    answers = ["yes", "no", *CORNERS, *SHAPES, *COLORS]
    roles = ["system\nuser\nassistant\n"]
    return roles + questions + [f"picture 1: {question}" for question in questions] + answers
