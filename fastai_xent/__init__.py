__version__ = "0.0.1"

_NOW = dict(store='fastai_xent.record and fastai_xent.writer', bridges='fastai_xent.export') # modules that were called otherwise

def __getattr__(name):
    if name in _NOW: raise AttributeError(f"fastai_xent.{name} is {_NOW[name]} now")
    raise AttributeError(f"module 'fastai_xent' has no attribute {name!r}")
