from rwkv_peft import lazy

_public = {"DataError": "rows",
           "TEMPLATES": "chat", "STOPS": "chat", "prompt_of": "chat", "lint": "chat",
_public = {"DataError": "rows", "open_source": "sources", "iter_rows": "sources", "read_rows": "sources",
           "Example": "masks",
           "Binidx": "binidx", "BinidxWriter": "binidx", "magic_prime": "binidx", "magic_order": "binidx",
           "Stored": "stored", "Report": "views",
           "Binidx": "binidx", "BinidxWriter": "binidx", "magic_prime": "binidx", "magic_order": "binidx", "to_binidx": "convert", "to_jsonl": "convert",
           "read_data": "records", "Dataset": "records",
           "batches": "batches", "Batch": "batches"}
__getattr__, __dir__ = lazy(__name__, _public)
