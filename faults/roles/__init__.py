"""What the processes of a run do, one module a role; `faults.load` starts them."""
