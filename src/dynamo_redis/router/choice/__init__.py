"""The choice of a worker: load book, selector, waiting line, and bookings shared with other routers."""
