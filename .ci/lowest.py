"""Prints pip constraints for the lowest versions that setup.cfg allows: `jax==0.8.2` for `jax>=0.8.2,<0.13`."""

import configparser
import pathlib
import re

config = configparser.ConfigParser()
config.read(pathlib.Path(__file__).parent.parent / "setup.cfg")
for requirement in (config["options"]["install_requires"] + config["options.extras_require"]["lowest"]).splitlines():
    if found := re.fullmatch(r"([\w-]+)>=([\w.]+)(,<[\w.]+)?", requirement):
        print(f"{found[1]}=={found[2]}")
