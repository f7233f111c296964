from rwkv_peft import lazy

_public = {"LoRA": "lora", "MethodError": "lora",
           "PiSSA": "inits", "OLoRA": "inits", "MiLoRA": "inits", "LoftQ": "inits", "EVA": "inits",
           "Bone": "shards", "Bat": "shards", "MiSS": "shards", "seed_method": "shards",
           "DoRA": "magnitude", "LISA": "lisa",
           "StateTuning": "state_tuning", "state_after": "state_tuning",
           "Train": "parts", "Table": "parts",
           "attach": "adapters", "detach": "adapters", "merge": "adapters", "save_adapter": "adapters", "load_adapter": "adapters", "trained_parameters": "adapters", "AdapterError": "adapters",
           "read_adapter": "adapters", "import_seed": "interop"}
__getattr__, __dir__ = lazy(__name__, _public)
