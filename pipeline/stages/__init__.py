"""Pipeline stages: the plan, its costs, the transfers, the order of micro-batches."""
