"""Every normaliser of the table `bnresearch.norm.NORMS` as a pure function, one file per family."""
