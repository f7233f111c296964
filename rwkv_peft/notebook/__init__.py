from rwkv_peft import lazy

_public = {"load_ipython_extension": "magic",
           "Panel": "panel",
           "SamplerLab": "sampler_lab"}
__getattr__, __dir__ = lazy(__name__, _public)
