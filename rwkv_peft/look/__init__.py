from rwkv_peft import lazy

_public = {"report": "report", "write_report": "report",
           "curves": "runs", "remarks": "runs", "remark_list": "runs", "rows_behind": "runs", "runs_table": "runs", "difference": "runs",
           "explain": "errors", "error_card": "errors"}
__getattr__, __dir__ = lazy(__name__, _public)
