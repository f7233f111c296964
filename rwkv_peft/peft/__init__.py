from rwkv_peft import lazy

_public = {"LoRA": "lora", "MethodError": "lora",
           "PiSSA": "inits", "OLoRA": "inits", "MiLoRA": "inits", "LoftQ": "inits", "EVA": "inits",
           "StateTuning": "state_tuning",
           "Train": "parts",
           "attach": "adapters", "detach": "adapters", "merge": "adapters", "save_adapter": "adapters", "load_adapter": "adapters", "trained_parameters": "adapters", "AdapterError": "adapters"}
__getattr__, __dir__ = lazy(__name__, _public)
