"""What LMDeploy reads in each worker: which class of ours takes the place of which of its models.

`ModelConfig.custom_module_map` is the path of this file. It holds names only, so that a worker
imports a model's class when it builds that model. It is alone in its folder because LMDeploy
appends that folder to `sys.path`.
"""

_MODELS = "ep_backends.lmdeploy.models"

MODULE_MAP = {
    "Qwen2VLForConditionalGeneration": f"{_MODELS}.PrunedQwen2VL",
    "Qwen2_5_VLForConditionalGeneration": f"{_MODELS}.PrunedQwen2_5VL",
    "LlavaForConditionalGeneration": f"{_MODELS}.PrunedLlava",
    "InternVLForConditionalGeneration": f"{_MODELS}.PrunedInternVL",
}
