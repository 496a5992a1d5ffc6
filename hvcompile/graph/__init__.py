"""Questions about FX graphs and nodes, and ways to edit them; nothing here knows of trunks."""
