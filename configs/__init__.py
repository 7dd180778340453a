"""What teal ships as data: the model catalog, calibration sets, dump recipes and default settings, as TOML.

Installed as the package `teal_cli.configs` and read through `teal_cli.settings.configs`. There is no code
here.
"""
