from rwkv_peft import lazy

_public = {"report": "report", "write_report": "report",
           "delta_history": "deltas", "Deltas": "deltas",
           "checkpoint_card": "checkpoint"}
__getattr__, __dir__ = lazy(__name__, _public)
