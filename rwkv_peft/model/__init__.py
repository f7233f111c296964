from rwkv_peft import lazy

_public = {"World": "tokenizer", "Bytes": "tokenizer", "Stream": "tokenizer", "tokenizer_for": "tokenizer",
           "Linear": "linear", "quantize": "quant", "Int8": "quant", "FourBit": "quant", "storage_of": "quant", "rounded": "quant",
           "CheckpointError": "files",
           "State": "state", "save_state": "state", "load_state": "state", "mix": "state", "difference": "state", "distance": "state",
           "RWKV": "rwkv", "RWKVConfig": "rwkv",
           "load": "checkpoint", "save": "checkpoint", "official": "checkpoint", "fingerprint": "checkpoint",
           "Sampler": "sample", "generate": "sample", "generate_batch": "sample", "Prefixes": "sample"}
__getattr__, __dir__ = lazy(__name__, _public)
