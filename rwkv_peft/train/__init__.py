from rwkv_peft import lazy

_public = {"Config": "config", "ConfigError": "config",
           "read_events": "events", "read_script": "script",
           "evaluate": "evaluate",
           "Run": "loop", "finetune": "loop", "TrainingError": "loop",
           "find_lr": "lr_finder"}
__getattr__, __dir__ = lazy(__name__, _public)
