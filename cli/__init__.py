"""The command line of mhmoe-np, installed as `mhmoe_cli`."""
