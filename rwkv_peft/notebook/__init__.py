from rwkv_peft import lazy

_public = {"load_ipython_extension": "magic", "attach": "attach", "environment": "env", "front_end": "env",
           "Panel": "panel", "SamplerLab": "sampler_lab", "StateLab": "state_lab",
           "TokenLab": "look_labs", "DeltaLab": "look_labs", "CheckpointLab": "look_labs"}
__getattr__, __dir__ = lazy(__name__, _public)
