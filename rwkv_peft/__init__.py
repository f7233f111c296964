"""Fine-tune RWKV models from a notebook cell, and see what changed."""
__version__ = "0.1.0"


def lazy(package: str, where: dict):
    "A module's `__getattr__` and `__dir__` that import a public name from its submodule when it is first used."
    from importlib import import_module

    def __getattr__(name):
        if name not in where: raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{where[name]}"), name)

    return __getattr__, lambda: sorted(where)


_public = {"RWKV": "model.rwkv", "RWKVConfig": "model.rwkv", "LoRA": "peft.lora", "PiSSA": "peft.inits", "OLoRA": "peft.inits", "MiLoRA": "peft.inits", "LoftQ": "peft.inits", "EVA": "peft.inits",
           "Bone": "peft.shards", "MiSS": "peft.shards", "DoRA": "peft.magnitude", "LISA": "peft.lisa", "StateTuning": "peft.state_tuning", "Train": "peft.parts",
           "attach": "peft.adapters", "detach": "peft.adapters", "merge": "peft.adapters", "save_adapter": "peft.adapters", "load_adapter": "peft.adapters", "import_seed": "peft.interop",
           "read_data": "data.records", "batches": "data.batches", "Config": "train.config", "Run": "look.runs", "finetune": "look.runs",
           "load_ipython_extension": "notebook.magic"}
__getattr__, __dir__ = lazy(__name__, _public)
