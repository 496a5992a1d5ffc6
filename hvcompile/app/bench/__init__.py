"""``hvcompile bench``: hvfast beside its peers, each in a process of its own."""
