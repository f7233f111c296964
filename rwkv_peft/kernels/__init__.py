from rwkv_peft import lazy

_public = {"wkv7": "wkv", "wkv6": "wkv", "wkv5": "wkv", "backends": "wkv",
           "native_status": "native",
           "int8_linear": "int8", "int8_status": "int8", "quantise_rows": "int8",
           "few_rows": "few_rows", "few_rows_int8": "few_rows",
           "linear_cross_entropy": "cross_entropy", "head_cross_entropy": "cross_entropy"}
__getattr__, __dir__ = lazy(__name__, _public)
