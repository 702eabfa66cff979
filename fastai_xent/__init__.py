"Cross-entropy that remembers every example. Written by hand, unlike the other modules."
import sys

__version__ = "0.0.1"

_NOW = dict(store='fastai_xent.record and fastai_xent.writer', bridges='fastai_xent.export',
            fused='fastai_xent.cpu_kernels', kernels='fastai_xent.gpu_kernels') # modules that were called otherwise

def __getattr__(name):
    if name in _NOW: raise AttributeError(f"fastai_xent.{name} is {_NOW[name]} now")
    raise AttributeError(f"module 'fastai_xent' has no attribute {name!r}")

class _Moved:
    "Asked last, when no module of a name is found: says what it is called now."
    @staticmethod
    def find_spec(name, path=None, target=None):
        package, _, old = name.rpartition('.')
        if package == __name__ and old in _NOW: raise ModuleNotFoundError(f"{name} is {_NOW[old]} now")

sys.meta_path.append(_Moved)
