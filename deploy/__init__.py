"""How the system runs: the embedded stack, the command line, the production manifests."""
