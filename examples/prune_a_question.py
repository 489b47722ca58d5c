"""Ask the bundled demonstration model about a picture, with a quarter of its visual tokens.

    python examples/prune_a_question.py

The same lines work with LLaVA-1.5 and Qwen2.5-VL checkpoints and `AutoProcessor`.
"""

from transformers import AutoModelForImageTextToText

import entropyprune
from ep_backends.shared.processor import load_processor
from ep_core import demo

model = AutoModelForImageTextToText.from_pretrained(demo.MODEL)
processor = load_processor(demo.MODEL)  # AutoProcessor, also where torchvision is missing
picture = str(demo.PICTURES / "sample_00.png")
message = {
    "role": "user",
    "content": [
        {"type": "image", "image": picture},
        {"type": "text", "text": "what number is written?"},
    ],
}
inputs = processor.apply_chat_template(
    [message],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    processor_kwargs={"return_tensors": "pt"},
).to(model.device, model.dtype)

with entropyprune.enable(model, "layer=2,keep=0.25,method=set-entropy") as pruning:
    output = model.generate(**inputs, max_new_tokens=8)
    (record,) = pruning.records

answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
for span in record.spans:
    print(f"kept {len(span.kept)} of {span.stop - span.start} visual tokens")
print(answer)
