"Packaging from `settings.ini` alone (nbdev 2's template needs pkg_resources, which newer setuptools lack)."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='])
config.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(Path(__file__).parent/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    keywords=cfg['keywords'].split(),
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    license_files=['LICENSE'],
    packages=find_packages(include=['medxfer_nb', 'medxfer_nb.*']),
    package_data={'medxfer_nb': ['study/*.json', 'page/*']},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in ('dev', 'cluster', 'parallel', 'interactive')},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['medxfer_nb=medxfer_nb._modidx:d']},
    zip_safe=False,
)
