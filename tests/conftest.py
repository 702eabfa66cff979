"What every test shares: no window, one thread, hypothesis the same each time."
import os

os.environ['MPLBACKEND'] = 'Agg'  # before anything imports matplotlib

import torch
from hypothesis import settings

torch.set_num_threads(1)  # small tensors: threads cost more than they save
settings.register_profile('house', deadline=None, derandomize=True, print_blob=True)
settings.load_profile('house')
