from rwkv_peft import lazy

_public = {"Html": "html", "escape": "html", "table": "html", "token_ribbon": "html", "page": "html",
           "curve": "curve", "curve_png": "curve"}
__getattr__, __dir__ = lazy(__name__, _public)
