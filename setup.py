"""Everything is declared in setup.cfg, except that the wheel carries the folder configs/ as marjax/configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["marjax", "marjax.*"]), "marjax.configs"],
    package_dir={"marjax.configs": "configs"},
)
