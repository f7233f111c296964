from rwkv_peft import lazy

_public = {"DataError": "rows", "open_source": "sources", "iter_rows": "sources", "read_rows": "sources",
           "TEMPLATES": "chat", "STOPS": "chat", "prompt_of": "chat", "lint": "chat",
           "Example": "masks",
           "Binidx": "binidx", "BinidxWriter": "binidx", "magic_prime": "binidx", "magic_order": "binidx", "to_binidx": "convert", "to_jsonl": "convert",
           "Stored": "stored", "Report": "views",
           "read_data": "records", "Dataset": "records",
           "batches": "batches", "Batch": "batches", "Loader": "batches"}
__getattr__, __dir__ = lazy(__name__, _public)
