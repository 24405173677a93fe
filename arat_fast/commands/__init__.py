"""One module a command of `arat-fast`."""
