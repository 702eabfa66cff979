"Hand settings.ini to setuptools; every other fact of the package stands in pyproject.toml."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

root = Path(__file__).parent
ini = ConfigParser()
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']


def listed(key, sep='\n'):
    "The entries of `key`, one a line unless `sep` says otherwise."
    return [o.strip() for o in cfg[key].split(sep) if o.strip()]


def long_description():
    "README.md with absolute addresses, since PyPI holds neither pictures nor other files."
    url = re.search(r'^Repository = "(.+)"', (root/'pyproject.toml').read_text(encoding='utf-8'), re.M)[1]
    text = (root/'README.md').read_text(encoding='utf-8').replace('](nbs/images/', f']({url}/raw/main/nbs/images/')
    return re.sub(r'\]\((?!\w+:|#)', f']({url}/blob/main/', text)


classifiers = ['Programming Language :: Python :: 3', 'Programming Language :: Python :: 3 :: Only', f"Development Status :: {cfg['status']}"]
classifiers += [f'Intended Audience :: {o}' for o in listed('audience', ',')]

setup(
    author=cfg['author'],
    license_expression=cfg['license'],
    keywords=cfg['keywords'].split(),
    classifiers=classifiers,
    long_description=long_description(),
    long_description_content_type='text/markdown',
    install_requires=listed('requirements'),
    extras_require={o.removesuffix('_requirements'): listed(o) for o in cfg if o.endswith('_requirements')})
