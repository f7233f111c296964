from rwkv_peft import lazy

_public = {"load_ipython_extension": "magic", "environment": "env", "front_end": "env"}
__getattr__, __dir__ = lazy(__name__, _public)
