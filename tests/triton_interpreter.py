"""Import this before fla: its kernels then run in Triton's interpreter, on the CPU, in float32.

Three things keep fla 0.6 and Triton 3.7 to 3.9 from doing so by themselves: the autotuner asks a driver for timings, `tl.gather` can't be interpreted (fla has another way where it is missing),
and loops inside kernels give plain integers where compiled code has tensors with `.to`."""
import builtins
import os

os.environ["TRITON_INTERPRET"] = "1"     # read when triton is imported

import triton.language
from triton.runtime import autotuner, interpreter


class Index(int):
    def to(self, *args, **kwargs): return self


def counted(*bounds):
    whole = lambda x: int(x.handle.data.item()) if hasattr(x, "handle") else int(x)
    return map(Index, builtins.range(*map(whole, bounds)))


tune = autotuner.Autotuner.__init__
autotuner.Autotuner.__init__ = lambda self, fn, arg_names, configs, *args, **kwargs: tune(self, fn, arg_names, configs[:1], *args, **kwargs)
if hasattr(triton.language, "gather"): del triton.language.gather
run = interpreter.GridExecutor.__call__


def run_with_counted(self, *args, **kwargs):
    names = self.fn.__globals__
    before = names.get("range", counted)
    names["range"] = counted
    try: return run(self, *args, **kwargs)
    finally:
        if before is counted: del names["range"]
        else: names["range"] = before


interpreter.GridExecutor.__call__ = run_with_counted
