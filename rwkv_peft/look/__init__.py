from rwkv_peft import lazy

_public = {"report": "report", "write_report": "report",
           "read_losses": "tokens", "loss_ribbon": "tokens", "compare": "tokens", "worst_rows": "tokens",
           "mosaic": "states", "spectra": "states", "growth": "states", "strip": "states", "state_over": "states", "who_wrote": "states",
           "deltas": "deltas", "delta_history": "deltas", "Deltas": "deltas",
           "record": "sampler", "load_recording": "sampler", "save_recording": "sampler", "inspect": "sampler", "stages_of": "sampler", "what_if": "sampler", "rerun": "sampler", "tree": "sampler", "beside": "sampler",
           "curves": "runs", "remarks": "runs", "remark_list": "runs", "rows_behind": "runs", "runs_table": "runs", "difference": "runs",
           "explain": "errors", "error_card": "errors",
           "checkpoint_card": "checkpoint"}
__getattr__, __dir__ = lazy(__name__, _public)
