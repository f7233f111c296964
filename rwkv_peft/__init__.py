"""Fine-tune RWKV models from a notebook cell, and see what changed."""
__version__ = "0.1.0"


def lazy(package: str, where: dict):
    """A package's `__getattr__` and `__dir__`, by which a public name is imported from its submodule when it is first used.

    A submodule that is called like a function of its own would hide that function once it is imported. Here the function stays in front, and holds the submodule's other public names:
    `look.report(folder)` and `look.report.card` both work, in any order of imports."""
    import sys
    from importlib import import_module
    from types import ModuleType

    class Package(ModuleType):
        def __setattr__(self, name, value):      # Python sets each submodule that it has imported
            if where.get(name) == name and isinstance(value, ModuleType): value = _in_front(value, name)
            super().__setattr__(name, value)

    def __getattr__(name):
        if name not in where: raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{where[name]}"), name)

    sys.modules[package].__class__ = Package
    return __getattr__, lambda: sorted(where)


def _in_front(module, name: str):
    function = getattr(module, name)
    vars(function).update({other: getattr(module, other) for other in module.__all__ if other != name})
    return function


_public = {"RWKV": "model.rwkv", "RWKVConfig": "model.rwkv", "LoRA": "peft.lora", "PiSSA": "peft.inits", "OLoRA": "peft.inits", "MiLoRA": "peft.inits", "LoftQ": "peft.inits", "EVA": "peft.inits",
           "Bone": "peft.shards", "MiSS": "peft.shards", "DoRA": "peft.magnitude", "LISA": "peft.lisa", "StateTuning": "peft.state_tuning", "Train": "peft.parts",
           "attach": "peft.adapters", "detach": "peft.adapters", "merge": "peft.adapters", "save_adapter": "peft.adapters", "load_adapter": "peft.adapters", "import_seed": "peft.interop",
           "read_data": "data.records", "batches": "data.batches", "Config": "train.config", "Run": "look.runs", "finetune": "look.runs",
           "load_ipython_extension": "notebook.magic"}
__getattr__, __dir__ = lazy(__name__, _public)
