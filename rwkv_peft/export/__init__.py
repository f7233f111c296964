from rwkv_peft import lazy

_public = {"merge_files": "merge", "export": "formats", "import_": "formats", "FORMATS": "formats",
           "export_hf": "names", "export_st": "st", "read_st": "st", "export_gguf": "gguf",
           "Later": "later", "write_later": "later"}
__getattr__, __dir__ = lazy(__name__, _public)
