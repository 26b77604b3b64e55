"""A build: its options, its plan, its units, its commit."""
