from rwkv_peft import lazy

_public = {"report": "report", "write_report": "report",
           "curves": "runs", "remarks": "runs", "remark_list": "runs", "rows_behind": "runs", "runs_table": "runs", "difference": "runs",
           "explain": "errors", "error_card": "errors",
           "record": "sampler", "load_recording": "sampler", "save_recording": "sampler", "inspect": "sampler", "stages_of": "sampler", "what_if": "sampler", "rerun": "sampler", "tree": "sampler", "beside": "sampler"}
__getattr__, __dir__ = lazy(__name__, _public)
