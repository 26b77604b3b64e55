"""A build: what it is told, its plan, its units, its commit."""
