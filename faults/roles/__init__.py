"""The roles of a run's processes, one module a role; `faults.load` starts them."""
