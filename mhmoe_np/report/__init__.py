"""Everything that is claimed, held against its bounds in one go: `mhmoe-np audit`."""
