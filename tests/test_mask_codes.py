"What the classes of masks are called."
import numpy as np
import pytest
import torch
from fastai.vision.all import DataBlock, ImageBlock, IndexSplitter, Learner, MaskBlock
from PIL import Image

from fastai_xent.losses import XentLossFlat
from fastai_xent.recorder import XentRecorder

@pytest.mark.parametrize('codes', [['sky', 'road', 'car'], np.array(['sky', 'road', 'car']), None, ['sky', 'road']], ids=['names', 'an array', 'none', 'too few'])
def test_the_codes_of_a_mask_block_name_the_classes(codes, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f'{i}.png')
        Image.fromarray(rng.integers(0, 3, (16, 16), dtype=np.uint8)).save(tmp_path / f'{i}_mask.png')
    block = DataBlock((ImageBlock, MaskBlock(codes)), get_y=lambda o: tmp_path / f'{o.stem}_mask.png', splitter=IndexSplitter([6, 7]))
    dls = block.dataloaders([tmp_path / f'{i}.png' for i in range(8)], bs=2, num_workers=0)
    learn = Learner(dls, torch.nn.Conv2d(3, 3, 1), loss_func=XentLossFlat(axis=1), cbs=[rec := XentRecorder()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    named = codes is not None and len(codes) == 3
    assert rec.record.vocab == (['sky', 'road', 'car'] if named else None)
    where = rec.record.where(0)
    assert where['targ'] in (rec.record.vocab if named else range(3))
