"""What this backend relies on in transformers: `ledger.toml`."""

from ep_core.ledger import Ledger

LEDGER = Ledger.read("ep_backends.transformers")

# of a decoder layer's forward pass, and of `generate`
LAYER_INPUTS = LEDGER["transformers.models.llama.modeling_llama:LlamaDecoderLayer.forward"].takes
GENERATE = LEDGER["transformers.generation.utils:GenerationMixin.generate"].takes
