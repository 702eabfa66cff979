"What every test shares: no window, one thread, hypothesis the same each time, and which cases of a grid are slow."
import os
import zlib
from collections import defaultdict
from itertools import combinations

os.environ['MPLBACKEND'] = 'Agg'  # before anything imports matplotlib

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # small tensors: threads cost more than they save
settings.register_profile('house', deadline=None, derandomize=True, print_blob=True)
settings.load_profile('house')


def pairs(item):
    "Every two of a case's parameters, each with which object its value is."
    return set(combinations([(k, id(v)) for k, v in sorted(item.callspec.params.items())], 2))


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    "Of a grid, cases in which every two values meet stay; the others are slow. The order of the cases is as good as drawn."
    met = defaultdict(set)
    for item in sorted(items, key=lambda o: zlib.crc32(o.nodeid.encode())):
        if item.get_closest_marker('grid') is None: continue
        test = item.nodeid.split('[')[0]
        if pairs(item) <= met[test]: item.add_marker('slow')
        met[test] |= pairs(item)
