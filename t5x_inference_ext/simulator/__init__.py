"""A service in virtual time: the real scheduler, with a clock in the place of its programs."""
