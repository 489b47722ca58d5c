"""What LMDeploy reads in each worker: which class of ours takes the place of which of its models.

`ModelConfig.custom_module_map` is the path of this file. It holds names only, so that a worker
makes a class when it builds that model. Which architectures are pruned is decided before
(`refusals.check_model`). This file is alone in its folder because LMDeploy appends that folder to
`sys.path`.
"""

from lmdeploy.pytorch.models import module_map as theirs

MODULE_MAP = {name: f"ep_backends.lmdeploy.models.Pruned{name}" for name in theirs.MODULE_MAP}
