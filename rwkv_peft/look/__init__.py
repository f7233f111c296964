from rwkv_peft import lazy

_public = {"report": "report", "write_report": "report"}
__getattr__, __dir__ = lazy(__name__, _public)
