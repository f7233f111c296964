from rwkv_peft import lazy

_public = {"demo_rows": "demo", "run_demo": "demo",
           "bench_wkv": "wkv",
           "bench_step": "step"}
__getattr__, __dir__ = lazy(__name__, _public)
