"""HTTP for the frontend: connections, limits, bodies, errors."""
