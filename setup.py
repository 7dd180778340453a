"""Lists the packages, which pyproject.toml can either find or name, but not both.

`configs/` stays at the root, where people look for it, and is shipped as the package `teal_cli.configs`.
`kernels/` is no package: Hugging Face's `kernels` has that name, and transformers imports it. Everything else
is in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["teal_cli", "teal_cli.*"]),
        "teal_cli.configs",
        *find_packages("kernels"),
    ]
)
