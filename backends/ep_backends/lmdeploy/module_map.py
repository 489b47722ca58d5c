"""What LMDeploy reads in each worker: which class of ours takes the place of which of its models.

`ModelConfig.custom_module_map` is the path of this file. Nothing here is imported for it but the
names, so that a worker imports a model's class only when it builds that model.
"""

_MODELS = "ep_backends.lmdeploy.models"

MODULE_MAP = {
    "Qwen2VLForConditionalGeneration": f"{_MODELS}.PrunedQwen2VL",
    "Qwen2_5_VLForConditionalGeneration": f"{_MODELS}.PrunedQwen2_5VL",
    "LlavaForConditionalGeneration": f"{_MODELS}.PrunedLlava",
    "InternVLForConditionalGeneration": f"{_MODELS}.PrunedInternVL",
}
