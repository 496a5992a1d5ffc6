"""The command line and what its commands do; above the library, which imports none of it."""
