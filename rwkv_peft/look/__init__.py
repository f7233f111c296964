from rwkv_peft import lazy

_public = {"report": "report", "write_report": "report",
           "mosaic": "states", "spectra": "states", "growth": "states", "beside": "states", "strip": "states", "state_over": "states", "who_wrote": "states"}
__getattr__, __dir__ = lazy(__name__, _public)
