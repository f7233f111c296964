from rwkv_peft import lazy

_public = {"report": "report", "write_report": "report",
           "read_losses": "tokens", "loss_ribbon": "tokens", "compare": "tokens", "worst_rows": "tokens"}
__getattr__, __dir__ = lazy(__name__, _public)
