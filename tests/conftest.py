"What every test shares: no window, one thread, hypothesis the same each time, and which cases of a grid are slow."
import gc
import os
import zlib
from collections import Counter, defaultdict
from itertools import combinations

os.environ['MPLBACKEND'] = 'Agg'  # before anything imports matplotlib

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # small tensors: threads cost more than they save
for device in torch.cuda, torch.xpu, torch.mtia:  # where there is none, torch writes down the whole stack at each seed, for one that may come
    if not device.is_available(): device.manual_seed_all = lambda seed: None

settings.register_profile('house', deadline=None, derandomize=True, print_blob=True)
settings.load_profile('house')


def pairs(item):
    "Every two of a case's parameters, each with which object its value is."
    return set(combinations([(k, id(v)) for k, v in sorted(item.callspec.params.items())], 2))


def covering(grid):
    "Cases in which every two values meet: each that has a pair not met before, less those all of whose pairs others have too."
    met, few = Counter(), []
    for item in grid:
        if pairs(item) <= met.keys(): continue
        few.append(item)
        met.update(pairs(item))
    for item in [*few]:
        if any(met[o] == 1 for o in pairs(item)): continue
        few.remove(item)
        met.subtract(pairs(item))
    return few


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    "Of a grid, cases in which every two values meet stay; the others are slow. The order of the cases is as good as drawn."
    grids = defaultdict(list)
    for item in sorted(items, key=lambda o: zlib.crc32(o.nodeid.encode())):
        if item.get_closest_marker('grid'): grids[item.nodeid.split('[')[0]].append(item)
    for grid in grids.values():
        few = covering(grid)
        for item in grid:
            if item not in few: item.add_marker('slow')


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop():
    "What has been imported by now stays: the garbage collector need not look at it again, nor workers that are forked copy it."
    gc.freeze()
    try: return (yield)
    finally: gc.unfreeze()
