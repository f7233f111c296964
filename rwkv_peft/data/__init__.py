from rwkv_peft import lazy

_public = {"DataError": "rows", "open_source": "sources", "iter_rows": "sources", "read_rows": "sources",
           "Example": "masks",
           "read_data": "records", "Dataset": "records",
           "batches": "batches", "Batch": "batches"}
__getattr__, __dir__ = lazy(__name__, _public)
