from rwkv_peft import lazy

_public = {"merge_files": "merge", "Later": "later", "write_later": "later"}
__getattr__, __dir__ = lazy(__name__, _public)
