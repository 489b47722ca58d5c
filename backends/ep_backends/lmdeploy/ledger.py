"""What this backend relies on in LMDeploy: `ledger.toml`."""

from ep_core.ledger import Ledger

LEDGER = Ledger.read("ep_backends.lmdeploy")

# of a decoder layer's forward pass
LAYER_ARGUMENTS = LEDGER["lmdeploy.pytorch.models.qwen2:Qwen2DecoderLayer.forward"].takes
