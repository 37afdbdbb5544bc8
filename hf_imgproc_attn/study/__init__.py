"""Studies: variants x seeds x tasks, trained from one start, in a ledger that survives a kill, with intervals."""
