from rwkv_peft import lazy

_public = {"report": "report", "write_report": "report",
           "record": "sampler", "load_recording": "sampler", "save_recording": "sampler", "inspect": "sampler", "stages_of": "sampler", "what_if": "sampler", "rerun": "sampler", "tree": "sampler", "beside": "sampler"}
__getattr__, __dir__ = lazy(__name__, _public)
